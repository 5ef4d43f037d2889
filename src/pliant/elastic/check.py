"""The self-check: does the architecture file describe what this model really computes?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy, anatomy_of, layers_of
from pliant.elastic.activate import Elastic
from pliant.elastic.reorder import reorder
from pliant.elastic.subnet import Subnet
from pliant.errors import ArchitectureError

TOLERANCE = 2e-4  # of the largest logit, in float32; sums are taken in another order, nothing else changes


@torch.no_grad()
def check(model: Any, anatomy: Anatomy | None = None, *, tokens: int = 8, seed: int = 0) -> None:
    """Prove on a few random tokens that the anatomy tells the truth; the model is left as it was.

    Three properties: reordering the units of every axis keeps the logits; a layer whose blocks are all skipped is the
    identity; a narrowed block computes what the full block computes with its dropped units silenced.

    Raises:
        ArchitectureError: naming the property and the block that break it.
    """
    anatomy = anatomy or anatomy_of(model)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    was_training = model.training
    model.eval()
    try:
        dense = _output(model, ids)
        _check_reorder(model, anatomy, ids, dense, generator)
        _check_skip(model, anatomy, ids)
        _check_narrow(model, anatomy, ids, generator)
    finally:
        model.train(was_training)


def _output(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False)[0].float()


def _tolerance(reference: torch.Tensor, dtype: torch.dtype) -> float:
    coarse = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return TOLERANCE * min(coarse, 100.0) * max(1.0, reference.abs().max().item())


def _check_reorder(
    model: nn.Module, anatomy: Anatomy, ids: torch.Tensor, dense: torch.Tensor, generator: torch.Generator
) -> None:
    orders = {name: torch.randperm(axis.size, generator=generator) for name, axis in anatomy.axes.items()}
    reorder(model, anatomy, orders)
    try:
        difference = (_output(model, ids) - dense).abs().max().item()
    finally:
        reorder(model, anatomy, {name: torch.argsort(order) for name, order in orders.items()})
    if not difference <= _tolerance(dense, next(model.parameters()).dtype):
        raise ArchitectureError(
            f"{anatomy.architecture.name}.yaml is wrong for this model: reordering units moved the logits by {difference:.3g}"
        )


def _check_skip(model: nn.Module, anatomy: Anatomy, ids: torch.Tensor) -> None:
    layers = layers_of(model, anatomy.architecture)
    blocks = [block for block in anatomy.blocks.values() if block.layer == _layer_to_skip(anatomy)]
    seen: dict[str, torch.Tensor] = {}

    def record(_module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        seen["in"] = args[0] if args else kwargs["hidden_states"]
        seen["out"] = output[0] if isinstance(output, tuple) else output

    elastic = Elastic(model, anatomy)
    handle = layers[blocks[0].layer].register_forward_hook(record, with_kwargs=True)
    try:
        elastic.activate(Subnet(frozenset(block.name for block in blocks)))
        _output(model, ids)
    finally:
        handle.remove()
        elastic.activate(Subnet())
    if not torch.equal(seen["in"], seen["out"]):
        raise ArchitectureError(
            f"{anatomy.architecture.name}.yaml is wrong for this model: layer {blocks[0].layer} still changes the residual "
            "stream after all its blocks are skipped"
        )


def _layer_to_skip(anatomy: Anatomy) -> int:
    """The last layer whose attention is not the only one of its type."""
    types = [anatomy.layer_types[block.layer] for block in anatomy.blocks.values() if block.spec.slot]
    return max(
        (b.layer for b in anatomy.blocks.values() if types.count(anatomy.layer_types[b.layer]) > 1),
        default=max(b.layer for b in anatomy.blocks.values()),
    )


def _check_narrow(model: nn.Module, anatomy: Anatomy, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Silencing dropped units (zeroing the matrix columns that read them) must equal cutting them."""
    layers = layers_of(model, anatomy.architecture)
    subnet = Subnet()
    for name, axis in anatomy.axes.items():
        if axis.size > 1:
            subnet = subnet.keeping(name, int(torch.randint(1, axis.size, (1,), generator=generator)))
    touched = []
    for block in anatomy.blocks.values():
        kept = subnet.kept(block)
        for weight in block.weights:
            if weight.reads is None or all(part.axis in block.fixed for part in weight.dims[weight.reads]):
                continue
            parameter = layers[block.layer].get_parameter(weight.path)
            touched.append((parameter, parameter.detach().clone()))
            width = sum(block.width(part, kept) for part in weight.dims[weight.reads])
            parameter.narrow(weight.reads, width, parameter.shape[weight.reads] - width).zero_()
    try:
        silenced = _output(model, ids)
    finally:
        for parameter, saved in touched:
            parameter.copy_(saved)
    elastic = Elastic(model, anatomy)
    try:
        elastic.activate(subnet)
        difference = (_output(model, ids) - silenced).abs().max().item()
    finally:
        elastic.activate(Subnet())
    if not difference <= _tolerance(silenced, next(model.parameters()).dtype):
        raise ArchitectureError(
            f"{anatomy.architecture.name}.yaml is wrong for this model: cutting units moved the logits by {difference:.3g} "
            "against silencing them"
        )
