"""What could go next: blocks, whole layers, and groups of units off the end of an axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from pliant.anatomy import Anatomy, Axis
from pliant.elastic import Subnet, parameters, ratio
from pliant.prune.width_cuts import widths
from pliant.searches.greedy import Move

Moves = Callable[[Subnet], Sequence[Move]]


def block_moves(anatomy: Anatomy, roles: Collection[str] | None = None) -> Moves:
    """Remove a whole block; the last holder of a state is never offered.

    Arguments:
        roles: only blocks of these roles; None for all.
    """
    return lambda subnet: [Move(b.name, subnet.without(b.name)) for b in anatomy.may_go(subnet.skip, roles)]


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


def step_moves(axes: Iterable[Axis], elements: int) -> Moves:
    """Narrow an axis of the dense model by one group, see :func:`pliant.prune.width_cuts.widths`."""
    steps = {axis.name: left[0] for axis in axes if (left := widths(axis, elements))}
    return lambda subnet: [Move(name, subnet.keeping(name, units)) for name, units in steps.items()]


def pooled(*several: Moves) -> Moves:
    """All the moves of several kinds, side by side."""
    return lambda subnet: [move for moves in several for move in moves(subnet)]


def unit_of(anatomy: Anatomy, moves: Moves) -> int:
    """Parameters of the smallest move in the dense model."""
    dense = parameters(anatomy)
    return min(dense - parameters(anatomy, move.subnet) for move in moves(Subnet()))


def fitting(anatomy: Anatomy, moves: Moves, target: float, units: Moves | None = None) -> Moves:
    """``moves`` without those that would bring the ratio to one unit or more above ``target``.

    One unit is the smallest share of all parameters that one move can still remove: a block, a group of channels, a key-value
    group with its queries, an expert. Near the target larger moves are skipped, and smaller ones remove the rest. Where all small
    units are gone, a larger one is offered; :func:`pliant.prune.put_back.put_backs` then finds which small ones come back.

    Arguments:
        units: all moves that may still follow, which determine the unit; default: ``moves``.
    """

    largest = max((ratio(anatomy, move.subnet) for move in moves(Subnet())), default=0.0)

    def found(subnet: Subnet) -> Sequence[Move]:
        reached = ratio(anatomy, subnet)
        if reached + largest < target:
            return moves(subnet)
        smallest = min((ratio(anatomy, move.subnet) - reached for move in (units or moves)(subnet)), default=0.0)
        return [move for move in moves(subnet) if ratio(anatomy, move.subnet) < target + smallest - 1e-12]

    return found


def settled(
    anatomy: Anatomy,
    subnet: Subnet,
    target: float,
    steps: Mapping[str, Sequence[int]],
    blocks: Collection[str] = (),
) -> Subnet:
    """Adjust ``subnet``, whose ratio is at least ``target``, to less than one unit above it.

    Units are restored while the ratio stays at least ``target``, the largest first. If the excess is still more than the smallest
    removable unit, one more unit is restored, which falls below the target, and small units are removed from the widest axes.

    Arguments:
        steps: full name of an axis -> the widths that it may keep, widest first; other axes are unchanged.
        blocks: blocks that may be restored, at their smallest width.
    """

    def at(kept: Mapping[str, int], skip: frozenset[str], axis: str, units: int) -> Subnet:
        keep = {name: left for name, left in {**kept, axis: units}.items() if left != steps.get(name, (0,))[0]}
        return Subnet(skip, tuple(sorted(keep.items())))

    def wider(now: Subnet) -> list[Subnet]:
        kept = dict(now.keep)
        found = [at(kept, now.skip, name, w[w.index(kept[name]) - 1]) for name, w in steps.items() if name in kept]
        for name in sorted(now.skip.intersection(blocks)):
            back = Subnet(now.skip - {name}, now.keep)
            for axis in anatomy.blocks[name].leaders:
                if len(steps.get(axis.name, ())) > 1:
                    back = back.keeping(axis.name, steps[axis.name][-1])
            found.append(back)
        return found

    def narrower(now: Subnet) -> list[Move]:
        kept, found = dict(now.keep), []
        there = {axis.name for b in anatomy.blocks.values() if b.name not in now.skip for axis in b.leaders}
        for name, w in steps.items():
            place = w.index(kept.get(name, w[0])) + 1
            if name in there and place < len(w):
                found.append(Move(name, at(kept, now.skip, name, w[place])))
        return found

    def put_back(now: Subnet) -> Subnet:
        while fit := [one for one in wider(now) if ratio(anatomy, one) >= target - 1e-12]:
            now = min(fit, key=lambda one: ratio(anatomy, one))
        return now

    subnet = put_back(subnet)
    reached = ratio(anatomy, subnet)
    smallest = min((ratio(anatomy, move.subnet) - reached for move in narrower(subnet)), default=1.0)
    if reached - target < smallest or not (short := wider(subnet)):
        return subnet
    subnet = max(short, key=lambda one: ratio(anatomy, one))
    fit = fitting(anatomy, narrower, target)
    while ratio(anatomy, subnet) < target - 1e-12:
        kept = dict(subnet.keep)
        shares = [(kept.get(move.unit, steps[move.unit][0]) / steps[move.unit][0], move) for move in fit(subnet)]
        subnet = max(shares, key=lambda one: one[0])[1].subnet
    return put_back(subnet)


def reach(anatomy: Anatomy, stages: Sequence[Moves]) -> float:
    """The largest ratio that these stages can come to, whatever their order and shares."""
    subnet = Subnet()
    for moves in stages:
        while offered := moves(subnet):
            subnet = offered[-1].subnet
    return ratio(anatomy, subnet)
