"""Moves: the next possible removals of blocks, whole layers, and groups of units at the end of an axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from pliant.anatomy import Anatomy, Axis, Block
from pliant.architecture import Part
from pliant.elastic import Subnet
from pliant.prune.ratio_target import TOLERANCE, Budget
from pliant.prune.scan_skip import scan_axis, scans_of, without_scan
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
    """Remove all remaining blocks of a layer."""
    of_blocks = block_moves(anatomy)

    def moves(subnet: Subnet) -> list[Move]:
        free = {move.unit for move in of_blocks(subnet)}
        offered = []
        for layer in range(anatomy.depth):
            alive = [block.name for block in anatomy.alive(subnet.skip) if block.layer == layer]
            if alive and free.issuperset(alive):
                offered.append(Move(f"layers.{layer}", subnet.without(*alive)))
        return offered

    return moves


def width_moves(anatomy: Anatomy, groups: Mapping[str, int]) -> Moves:
    """Remove a group of units from the end of an axis; the units that one token uses always stay.

    Arguments:
        groups: short name of an axis (``channels``, ``kv``) -> units in a group; other axes are left alone.
    """
    return axis_moves(anatomy, {a.name: groups[a.leader] for a in anatomy.axes.values() if a.leader in groups})


def axis_moves(anatomy: Anatomy, groups: Mapping[str, int]) -> Moves:
    """:func:`width_moves` of single axes.

    Arguments:
        groups: full name of an axis -> units in a group.
    """
    axes = [axis for axis in anatomy.axes.values() if axis.name in groups]
    holders = {
        a.name: {b.name for b in anatomy.blocks.values() if a.leader in b.axes and b.axes[a.leader] == a} for a in axes
    }

    def moves(subnet: Subnet) -> list[Move]:
        keep, removed = dict(subnet.keep), anatomy.removed_with(subnet.skip)
        offered = []
        for axis in axes:
            units = axis.less(keep.get(axis.name, axis.size), groups[axis.name])
            if (
                any(_has(anatomy.blocks[name], axis, subnet) for name in holders[axis.name] - removed)
                and units is not None
            ):
                offered.append(Move(axis.name, subnet.keeping(axis.name, units)))
        return offered

    return moves


def _has(block: Block, axis: Axis, subnet: Subnet) -> bool:
    """Whether an axis has units; one that depends on another may be gone."""
    return block.units(Part(axis.leader), subnet.kept(block)) > 0


def scan_moves(anatomy: Anatomy) -> Moves:
    """Remove the state of a scan, so that only its skip remains; see :mod:`pliant.prune.scan_skip`."""
    states = {block.name: axis.name for block in scans_of(anatomy) if (axis := scan_axis(block))}

    def moves(subnet: Subnet) -> list[Move]:
        gone = {*subnet.skip, *(block.name for block in without_scan(anatomy, subnet))}
        return [Move(f"{name}.ssm", subnet.keeping(axis, 0)) for name, axis in states.items() if name not in gone]

    return moves


def step_moves(axes: Iterable[Axis], elements: int) -> Moves:
    """Narrow an axis of the dense model by one group, see :func:`pliant.prune.width_cuts.widths`."""
    steps = {axis.name: allowed[0] for axis in axes if (allowed := widths(axis, elements))}
    return lambda subnet: [Move(name, subnet.keeping(name, units)) for name, units in steps.items()]


def pooled(*several: Moves) -> Moves:
    """The moves of several kinds together."""
    return lambda subnet: [move for moves in several for move in moves(subnet)]


def unit_of(budget: Budget, moves: Moves, anatomy: Anatomy) -> int:
    """Cost of the smallest move in the dense model; measured costs may not fall with every move.

    A block that shares its tensors is not counted if there are others: without it, little or nothing is saved.
    """
    offered = moves(Subnet())
    tied = {block.name for block in anatomy.blocks.values() if block.tied is not None}
    alone = [move for move in offered if move.unit not in tied]
    saved = (budget.dense - budget.size(move.subnet) for move in alone or offered)
    return min((cost for cost in saved if cost > 0), default=1)


def fitting(budget: Budget, moves: Moves, ratio: float, units: Moves | None = None) -> Moves:
    """``moves`` without those that would end one unit or more above ``ratio``.

    One unit is the smallest share of the budget that one move can still remove: a block, a group of channels, a
    key-value group with its queries, an expert. Near the ratio larger moves are skipped, and smaller ones remove the
    rest. If no small units remain, a larger one is offered; :func:`pliant.prune.put_back.put_backs` then chooses the
    small ones to put back.

    Arguments:
        units: all moves that may still follow, which determine the unit; default: ``moves``.
    """

    largest = max((budget.ratio(move.subnet) for move in moves(Subnet())), default=0.0)

    def fit(subnet: Subnet) -> Sequence[Move]:
        now = budget.ratio(subnet)
        if now + largest < ratio:
            return moves(subnet)
        gains = (budget.ratio(move.subnet) - now for move in (units or moves)(subnet))
        smallest = min((gain for gain in gains if gain > 0), default=0.0)
        return [move for move in moves(subnet) if budget.ratio(move.subnet) < ratio + smallest - TOLERANCE]

    return fit


def settled(
    budget: Budget,
    anatomy: Anatomy,
    subnet: Subnet,
    ratio: float,
    steps: Mapping[str, Sequence[int]],
    blocks: Collection[str] = (),
) -> Subnet:
    """Adjust ``subnet``, which removes at least ``ratio``, to less than one unit above it.

    Units are restored while the ratio stays reached, the largest first. If the excess is still more than the smallest
    removable unit, one more unit is restored, which falls below the ratio, and small units are removed from the widest
    axes.

    Arguments:
        steps: full name of an axis -> the widths that it may keep, widest first; other axes are unchanged.
        blocks: blocks that may be restored, at their smallest width.
    """

    def at(keep: Mapping[str, int], skip: frozenset[str], axis: str, units: int) -> Subnet:
        narrow = {name: width for name, width in {**keep, axis: units}.items() if width != steps.get(name, (0,))[0]}
        return Subnet(skip, tuple(sorted(narrow.items())))

    def wider(now: Subnet) -> list[Subnet]:
        keep = dict(now.keep)
        offered = [at(keep, now.skip, name, w[w.index(keep[name]) - 1]) for name, w in steps.items() if name in keep]
        for name in sorted(now.skip.intersection(blocks)):
            back = Subnet(now.skip - {name}, now.keep)
            for axis in anatomy.blocks[name].leaders:
                if len(steps.get(axis.name, ())) > 1:
                    back = back.keeping(axis.name, steps[axis.name][-1])
            offered.append(back)
        return offered

    def narrower(now: Subnet) -> list[Move]:
        keep, offered = dict(now.keep), []
        alive = {axis.name for block in anatomy.alive(now.skip) for axis in block.leaders}
        for name, w in steps.items():
            index = w.index(keep.get(name, w[0])) + 1
            if name in alive and index < len(w):
                offered.append(Move(name, at(keep, now.skip, name, w[index])))
        return offered

    def restored(now: Subnet) -> Subnet:
        while fit := [other for other in wider(now) if budget.reached(other, ratio)]:
            now = min(fit, key=budget.ratio)
        return now

    subnet = restored(subnet)
    now = budget.ratio(subnet)
    smallest = min((gain for m in narrower(subnet) if (gain := budget.ratio(m.subnet) - now) > 0), default=1.0)
    if now - ratio < smallest or not (short := wider(subnet)):
        return subnet
    subnet = max(short, key=budget.ratio)
    fit = fitting(budget, narrower, ratio)
    while not budget.reached(subnet, ratio):
        keep = dict(subnet.keep)
        shares = [(keep.get(move.unit, steps[move.unit][0]) / steps[move.unit][0], move) for move in fit(subnet)]
        subnet = max(shares, key=lambda pair: pair[0])[1].subnet
    return restored(subnet)


def reach(budget: Budget, stages: Sequence[Moves]) -> float:
    """The largest ratio that these stages can reach, whatever their order and shares."""
    return budget.ratio(exhausted(stages)[0])


def exhausted(stages: Sequence[Moves]) -> tuple[Subnet, int]:
    """The sub-network after all moves of these stages, and how many there are; the most if the finest come first."""
    subnet, made = Subnet(), 0
    for moves in stages:
        while offered := moves(subnet):
            subnet, made = offered[-1].subnet, made + 1
    return subnet, made
