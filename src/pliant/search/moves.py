"""What could go next: blocks, whole layers, and groups of units off the end of an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet, ratio
from pliant.search.greedy import Move

Moves = Callable[[Subnet], Sequence[Move]]


def block_moves(anatomy: Anatomy, kinds: Sequence[str] = ("attention", "mlp")) -> Moves:
    """Remove a whole block. The last attention of each type is never offered."""

    def moves(subnet: Subnet) -> list[Move]:
        alive = [b for b in anatomy.blocks.values() if b.name not in subnet.skip]
        left = [anatomy.layer_types[b.layer] for b in alive if b.spec.slot]
        return [
            Move(b.name, subnet.without(b.name))
            for b in alive
            if b.kind in kinds and b.removable and not (b.spec.slot and left.count(anatomy.layer_types[b.layer]) == 1)
        ]

    return moves


def layer_moves(anatomy: Anatomy) -> Moves:
    """Remove what is left of a whole layer."""
    of_blocks = block_moves(anatomy)

    def moves(subnet: Subnet) -> list[Move]:
        free = {move.unit for move in of_blocks(subnet)}
        found = []
        for layer in range(anatomy.depth):
            alive = [b.name for b in anatomy.blocks.values() if b.layer == layer and b.name not in subnet.skip]
            if alive and free.issuperset(alive):
                found.append(Move(f"layers.{layer}", subnet.without(*alive)))
        return found

    return moves


def width_moves(anatomy: Anatomy, groups: Mapping[str, int]) -> Moves:
    """Take a group of units off the end of an axis; what a token needs always stays.

    Arguments:
        groups: short name of an axis (``channels``, ``kv``) -> units in a group; other axes are left alone.
    """
    axes = [axis for axis in anatomy.axes.values() if axis.leader in groups]
    having = {
        a.name: {b.name for b in anatomy.blocks.values() if a.leader in b.axes and b.axes[a.leader] == a} for a in axes
    }

    def moves(subnet: Subnet) -> list[Move]:
        kept = dict(subnet.keep)
        found = []
        for axis in axes:
            left = axis.less(kept.get(axis.name, axis.size), groups[axis.leader])
            if not having[axis.name] <= subnet.skip and left is not None:
                found.append(Move(axis.name, subnet.keeping(axis.name, left)))
        return found

    return moves


def pooled(*several: Moves) -> Moves:
    """All the moves of several kinds, side by side."""
    return lambda subnet: [move for moves in several for move in moves(subnet)]


def head_axes(anatomy: Anatomy) -> list[str]:
    """Short names of the axes that attention heads are chosen by."""
    return sorted({axis.leader for b in anatomy.blocks.values() if b.kind == "attention" for axis in b.leaders})


def reach(anatomy: Anatomy, stages: Sequence[Moves]) -> float:
    """The largest ratio that these stages can come to, whatever their order and shares."""
    subnet = Subnet()
    for moves in stages:
        while offered := moves(subnet):
            subnet = offered[-1].subnet
    return ratio(anatomy, subnet)
