"""Find the blocks that share tensors, which are cut alike and counted once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from pliant.anatomy.block import Block
from pliant.errors import ArchitectureError


def tie(blocks: Mapping[str, Block], layers: nn.ModuleList) -> dict[str, Block]:
    """The blocks; those that share their tensors share their axes."""
    owners: dict[int, str] = {}
    shared: dict[str, tuple[str, set[str]]] = {}  # block -> the first block that holds its tensors, and their paths
    for block in blocks.values():
        held = _identities(block, layers[block.layer])
        firsts = {owners.setdefault(tensor, block.name) for tensor in held.values()} - {block.name}
        if not firsts:
            continue
        first = min(firsts)
        paths = {path for path, tensor in held.items() if owners[tensor] == first}
        alike = _identities(blocks[first], layers[blocks[first].layer])
        if len(firsts) > 1 or not block.spec.tied or any(alike.get(path) != held[path] for path in paths):
            raise ArchitectureError(
                f"{block.name} shares tensors with {', '.join(sorted(firsts))}; blocks of one kind that share tensors "
                "need 'tied: true' in the architecture file, and others cannot be cut"
            )
        if shared.setdefault(first, (first, paths))[1] != paths:
            raise ArchitectureError(f"{block.name} and others share different tensors with {first}; they cannot be cut")
        shared[block.name] = (first, paths)
    for block in blocks.values():
        for path in block.unused:
            unused = layers[block.layer].get_submodule(path)
            if any(id(tensor) not in owners for tensor in unused.parameters()):
                raise ArchitectureError(
                    f"{block.name} holds {path!r}, which belongs to another layer and is not shared with it; tie the "
                    "blocks first"
                )
    return {
        name: _tied(block, layers[block.layer], *shared[name]) if name in shared else block
        for name, block in blocks.items()
    }


def _identities(block: Block, layer: nn.Module) -> dict[str, int]:
    """Path -> identity of the tensor, for the weights of a block and its norms."""
    norms = [path for path in block.removed if path not in block.spec.modules]
    held = {weight.path: weight.identity(layer) for weight in block.weights}
    return held | {
        name: id(tensor) for path in norms for name, tensor in layer.get_submodule(path).named_parameters(prefix=path)
    }


def _tied(block: Block, layer: nn.Module, first: str, paths: Collection[str]) -> Block:
    """A block that shares the tensors at ``paths`` with ``first``."""
    weights = tuple(replace(weight, tied=weight.path in paths) for weight in block.weights)
    parts = {part.axis for weight in weights if weight.tied for dim in weight.dims for part in dim}
    leaders = {axis.leader for short, axis in block.axes.items() if short in parts}
    axes = {
        short: replace(axis, name=f"tied.{first}.{short}") if axis.leader in leaders else axis
        for short, axis in block.axes.items()
    }
    norms = _identities(block, layer).keys() - {weight.path for weight in weights}
    if norms & set(paths) and not norms.issubset(paths):
        raise ArchitectureError(f"{block.name} shares only some of its norms with {first}; it cannot be cut")
    return replace(block, axes=axes, weights=weights, tied=first, norms_tied=bool(norms & set(paths)))
