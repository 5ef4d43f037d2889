"""The self-check: test whether the anatomy describes what a model really computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pliant.anatomy import (
    Anatomy,
    Axis,
    Block,
    Weight,
    anatomy_of,
    counted_once,
    evaluating,
    layers_of,
    output_of,
    probe,
    rounding,
)
from pliant.elastic.activate import Elastic, narrow
from pliant.elastic.reorder import reorder, restore
from pliant.elastic.subnet import Subnet
from pliant.errors import ArchitectureError, WeightError

TOLERANCE = 2e-4  # share of the largest logit, in float32: only the order of summation differs


@torch.no_grad()
def check(model: Any, anatomy: Anatomy | None = None, *, tokens: int = 8, seed: int = 0) -> None:
    """Check on a few random tokens that the anatomy is right; the model is left as it was.

    Three properties are checked: reordering the units of every axis keeps the logits; a layer whose blocks are all
    skipped is the identity; a narrowed block computes the same as the full block with the dropped units zeroed.

    Raises:
        ArchitectureError: a property fails, and the message names it; or all blocks of the model were removed.
        WeightError: the model's outputs are not finite.
    """
    anatomy = anatomy or anatomy_of(model)
    if not anatomy.blocks:
        raise ArchitectureError(
            f"every block of this {type(model).__name__} was removed, so it cannot be checked; use the model before "
            "the cut"
        )
    generator = torch.Generator().manual_seed(seed)
    inputs = probe(model, tokens=tokens, seed=seed)
    with evaluating(model):
        dense = _output(model, inputs)
        _check_reorder(model, anatomy, inputs, dense, generator)
        _check_skip(model, anatomy, inputs)
        _check_narrow(model, anatomy, inputs, generator)


def _output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return output_of(model, inputs).float()


def _source(anatomy: Anatomy) -> str:
    """The description that is wrong if a check fails."""
    name = anatomy.source.name
    return f"the trace of {name}" if anatomy.traced else f"{name}.yaml"


def _check_reorder(
    model: nn.Module, anatomy: Anatomy, inputs: dict[str, Any], dense: torch.Tensor, generator: torch.Generator
) -> None:
    orders = {name: _shuffled(axis, generator) for name, axis in anatomy.axes.items()}
    reorder(model, anatomy, orders)
    try:
        difference = (_output(model, inputs) - dense).abs().max().item()
    finally:
        restore(model, anatomy, orders)
    if not math.isfinite(difference):
        raise WeightError("the model's outputs on a few tokens are not finite numbers; check its weights")
    if not difference <= TOLERANCE * rounding(dense, next(model.parameters()).dtype):
        raise ArchitectureError(
            f"{_source(anatomy)} is wrong for this model: reordering units changed the logits by {difference:.3g}"
        )


def _shuffled(axis: Axis, generator: torch.Generator) -> torch.Tensor:
    """A random order of the units in each group of each copy."""
    in_group = axis.size // axis.groups
    draws = [torch.randperm(in_group, generator=generator) for _ in range(axis.copies * axis.groups)]
    firsts = torch.arange(axis.groups).unsqueeze(1) * in_group
    return (torch.stack(draws).view(axis.copies, axis.groups, in_group) + firsts).view(axis.shape)


def _check_skip(model: nn.Module, anatomy: Anatomy, inputs: dict[str, Any]) -> None:
    if anatomy.traced:  # a trace calls a block removable only if skipping it is the identity
        return
    layers = layers_of(model, anatomy.source)
    blocks = [block for block in anatomy.blocks.values() if block.layer == _layer_to_skip(anatomy)]
    seen: dict[str, torch.Tensor] = {}

    def record(_module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        seen["in"] = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        seen["out"] = output[0] if isinstance(output, tuple) else output

    elastic = Elastic(model, anatomy)
    handle = layers[blocks[0].layer].register_forward_hook(record, with_kwargs=True)
    try:
        elastic.activate(Subnet(frozenset(block.name for block in blocks)))
        _output(model, inputs)
    finally:
        handle.remove()
        elastic.activate(Subnet())
    if not torch.equal(seen["in"], seen["out"]):
        raise ArchitectureError(
            f"{anatomy.architecture.name}.yaml is wrong for this model: layer {blocks[0].layer} still changes the "
            "residual stream after all its blocks are skipped"
        )


def _layer_to_skip(anatomy: Anatomy) -> int:
    """The last layer whose blocks may all be removed: none is the only one of its layer type that keeps a state."""
    only = {blocks[0].layer for blocks in anatomy.holders().values() if len(blocks) == 1}
    layers = {block.layer for block in anatomy.blocks.values()}
    return max(layers - only or layers)


def _check_narrow(model: nn.Module, anatomy: Anatomy, inputs: dict[str, Any], generator: torch.Generator) -> None:
    """Cutting units must equal zeroing everything that belongs to them.

    Experts are exempt, because a token that would use a dropped expert uses another one. So are units over which a norm
    is taken that is not rescaled, because zeroed units count in it. There the model only has to run.
    """
    layers = layers_of(model, anatomy.source)
    subnet = everything = Subnet()
    for axis in anatomy.axes.values():
        narrower = axis.less(axis.size, int(torch.randint(1, max(1, axis.size) + 1, (1,), generator=generator)))
        if narrower is not None and axis.active is None:
            everything = everything.keeping(axis.name, narrower)
            subnet = subnet if axis.normed else subnet.keeping(axis.name, narrower)
    zeroed_slices = []
    for block, first in counted_once(anatomy.blocks.values()):
        for weight in block.weights:
            if weight.tied and not first:
                continue
            for position, dropped in _dropped(block, weight, subnet.kept(block)):
                parameter = weight.tensor(layers[block.layer])
                index = dropped.to(parameter.device)
                zeroed_slices.append((parameter, position, index, parameter.index_select(position, index)))
                parameter.index_fill_(position, index, 0)
    try:
        zeroed = _output(model, inputs)
    finally:
        for parameter, position, index, saved in reversed(zeroed_slices):
            parameter.index_copy_(position, index, saved)
    elastic = Elastic(model, anatomy)
    try:
        elastic.activate(subnet)
        difference = (_output(model, inputs) - zeroed).abs().max().item()
        if everything != subnet:
            elastic.activate(everything)
            _output(model, inputs)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # shapes that do not match
        reason = str(error).splitlines()[0]
        raise ArchitectureError(
            f"{_source(anatomy)} is wrong for this model: with units cut it does not run ({reason})"
        ) from error
    finally:
        elastic.activate(Subnet())
    if not difference <= TOLERANCE * rounding(zeroed, next(model.parameters()).dtype):
        raise ArchitectureError(
            f"{_source(anatomy)} is wrong for this model: cutting units and zeroing them give logits that differ by "
            f"{difference:.3g}"
        )


def _dropped(block: Block, weight: Weight, kept: Mapping[str, int]) -> Iterator[tuple[int, torch.Tensor]]:
    """For every dimension of a parameter that narrows, its index and the elements that are dropped."""
    for position, dim in enumerate(() if weight.buffer else weight.dims):
        elements = torch.arange(sum(block.width(part, {}) for part in dim))
        remaining = narrow(elements, block, Weight("", (dim,)), kept)
        if remaining.numel() < elements.numel():
            yield position, elements[torch.isin(elements, remaining, invert=True)]
