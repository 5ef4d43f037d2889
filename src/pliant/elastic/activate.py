"""Run a model as one of its sub-networks: the same modules reading sliced views of the same tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy, Block, Null, NullNorm, Weight, anatomy_of, layers_of, plain_config
from pliant.elastic.subnet import Subnet, validate
from pliant.torch_private import own_tensors


class Follower:
    """A config seen by one module: some keys have that module's own value, every other key is the live config's."""

    def __init__(self, config: Any, values: Mapping[str, int]):
        self._config, self._values = config, dict(values)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        values = self.__dict__["_values"]
        return values[key] if key in values else getattr(self.__dict__["_config"], key)


def narrow(tensor: torch.Tensor, block: Block, weight: Weight, kept: Mapping[str, int]) -> torch.Tensor:
    """The part of a full tensor that belongs to the kept units.

    It is a view if each dimension is one stretch; a fused dimension (q, k and v in one matrix, concatenated channels)
    is gathered into a copy.
    """
    if weight.alone is not None and kept.get(str(weight.skips)) == 0:
        tensor = weight.alone
    for position, dim in enumerate(weight.dims):
        stretches, start = [], 0
        for part in dim:
            stretch = tensor.narrow(position, start, block.width(part, {}))
            stretches.append(_kept_part(stretch, position, block.pieces(part, {}), block.pieces(part, kept)))
            start += stretch.shape[position]
        kept_in_all = sum(stretch.shape[position] for stretch in stretches)
        if start != kept_in_all:
            tensor = stretches[0] if len(stretches) == 1 else torch.cat(stretches, position)
            if weight.rescaled is not None:
                full, now = (block.measured(dim, weight.rescaled, of) for of in ({}, kept))
                tensor = tensor * math.sqrt(full / now) if now not in (0, full) else tensor
    return tensor


def _kept_part(stretch: torch.Tensor, position: int, full: tuple[int, ...], kept: tuple[int, ...]) -> torch.Tensor:
    """The first copies, of each the first groups, and of each the first elements."""
    if full[:2] == (1, 1):
        return stretch.narrow(position, 0, kept[2])
    split = stretch.unflatten(position, full)
    for offset, size in enumerate(kept):
        split = split.narrow(position + offset, 0, size)
    return split.flatten(position, position + 2)


@torch.no_grad()
def give_back(part: torch.Tensor, full: torch.Tensor, block: Block, weight: Weight, kept: Mapping[str, int]) -> None:
    """Write a gathered tensor back into the full one: statistics that a batch norm collected, or a refitted matrix.

    Arguments:
        part: the result of :func:`narrow` for ``full``; a view needs no writing back.
    """
    if part.untyped_storage().data_ptr() == full.untyped_storage().data_ptr():
        return
    elements = [
        narrow(torch.arange(size, device=full.device), block, Weight("", (dim,)), kept)
        for size, dim in zip(full.shape, weight.dims, strict=True)
    ]
    full[torch.meshgrid(*elements, indexing="ij")] = part


def follow(layer: nn.Module, block: Block, kept: Mapping[str, int]) -> None:
    """Set the plain attributes of a block's modules (``out_features``, ``num_heads`` …) to the kept sizes."""
    for attribute in block.attributes:
        module: Any = layer.get_submodule(attribute.path)
        value = block.value(attribute, kept)
        key = attribute.name.removeprefix("config.")
        if key == attribute.name:
            setattr(module, key, (value,) if isinstance(getattr(module, key, None), tuple) else value)
        else:
            seen: Any = module.config
            base, values = (seen._config, seen._values) if isinstance(seen, Follower) else (seen, {})
            values, plain = {**values, key: value}, plain_config(base)
            same = all(getattr(plain, known) == own for known, own in values.items())
            module.config = base if same else Follower(base, values)


def stand_in(block: Block, path: str, module: nn.Module) -> nn.Module:
    """The module that replaces one of a removed block."""
    if path != block.spec.module:
        return NullNorm(module)
    spec = block.spec
    passes = None if spec.passes is None else block.fixed[spec.passes]
    attention = spec.scores is not None
    return Null(spec.returns_tuple, spec.residual, attention=attention, passes=passes, counts=spec.counts)


def slot(index: int, alive: Collection[int], layer_types: Sequence[str]) -> int:
    """The cache slot of the block in layer ``index`` that keeps a state.

    A model reads how many tokens it has seen from the first slot of each layer type, so the first surviving layer of
    a type takes the first slot of that type. All others keep their own.

    Arguments:
        alive: the layers that still have their block with this state.
    """
    of_type = [other for other, kind in enumerate(layer_types) if kind == layer_types[index]]
    return of_type[0] if index == min(set(of_type) & set(alive)) else index


def place_in_cache(layers: nn.ModuleList, anatomy: Anatomy, skip: Collection[str] = ()) -> None:
    """Give every block that keeps a state its cache slot, see :func:`slot`.

    Arguments:
        skip: the blocks that are skipped.
    """
    for holders in anatomy.holders(skip).values():
        alive = [block.layer for block in holders]
        for block in holders:
            module = layers[block.layer].get_submodule(block.spec.module)
            setattr(module, str(block.spec.slot), slot(block.layer, alive, anatomy.layer_types))


class Elastic:
    """A model whose active sub-network can be changed, and restored, in about a millisecond.

    The full parameters stay where they are in memory; gradients flow into their kept part. While a sub-network is
    active, ``model.parameters()`` yields the views.

    Arguments:
        model: a transformers model.
        anatomy: its anatomy; default: read from the model.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None = None):
        self.model = model
        self.anatomy = anatomy or anatomy_of(model)
        self.layers = layers_of(model, self.anatomy.source)
        self.active = Subnet()
        self._full: dict[str, dict[str, torch.Tensor]] = {}
        self._modules: dict[str, dict[str, nn.Module]] = {}
        for block in self.anatomy.blocks.values():
            layer = self.layers[block.layer]
            self._full[block.name] = {weight.path: weight.tensor(layer) for weight in block.weights}
            self._modules[block.name] = {
                path: layer.get_submodule(path) for path in (block.spec.module, *block.removed)
            }

    def activate(self, subnet: Subnet, *, stretch: bool = False) -> None:
        """Make the model compute as ``subnet`` from now on. Only blocks that change are touched.

        Arguments:
            stretch: only a stretch of layers will run, without a cache, so all attention may be skipped.
        """
        if subnet == self.active:
            return
        validate(subnet, self.anatomy, stretch=stretch)
        removed, before = self.anatomy.removed_with(subnet.skip), self.anatomy.removed_with(self.active.skip)
        changed = [b for b in self.anatomy.blocks.values() if (b.name in removed) != (b.name in before)]
        for block in changed:
            self._set_skipped(block, block.name in removed)
        touched = {block.tied for block in changed} - {
            None
        }  # tied blocks may be one module, whose state is now unknown
        for block in self.anatomy.alive(subnet.skip):
            # a module that was put aside is full, whatever is kept of a shared axis
            held = Subnet() if block.name in before else self.active
            if block.tied in touched or subnet.kept(block) != held.kept(block):
                self._set_kept(block, subnet.kept(block))
        if any(block.spec.state for block in changed):
            place_in_cache(self.layers, self.anatomy, subnet.skip)
        self.active = subnet

    def _set_skipped(self, block: Block, skipped: bool) -> None:
        layer = self.layers[block.layer]
        if skipped:  # widen first, so that a module that is put aside is always full
            self._set_kept(block, {})
        for path, module in self._modules[block.name].items():
            layer.set_submodule(path, stand_in(block, path, module) if skipped else module)

    def _set_kept(self, block: Block, kept: Mapping[str, int]) -> None:
        layer = self.layers[block.layer]
        for weight in block.weights:
            full = self._full[block.name][weight.path]
            path, _, name = weight.path.rpartition(".")
            own = own_tensors(layer.get_submodule(path), weight.buffer)
            if weight.buffer:
                give_back(own[name], full, block, weight, self.active.kept(block))
            own[name] = narrow(full, block, weight, kept)
        follow(layer, block, kept)


@contextmanager
def activate(model: nn.Module, subnet: Subnet) -> Iterator[nn.Module]:
    """Run a sub-network: ``with activate(model, subnet): model(...)``. Afterwards the model is as before."""
    elastic = Elastic(model)
    try:
        elastic.activate(subnet)
        yield model
    finally:
        elastic.activate(Subnet())
