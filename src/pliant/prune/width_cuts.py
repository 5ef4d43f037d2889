"""Widths that an axis can be cut to, and how many cuts reach a ratio."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from math import gcd, inf, lcm

from pliant.anatomy import Axis
from pliant.elastic import Subnet
from pliant.prune.ratio_target import TOLERANCE


def widths(axis: Axis, elements: int, least: int = 0) -> list[int]:
    """Allowed widths of an axis in units, from widest to narrowest, when groups are removed from its end; at least
    ``least`` units, and the fewest that the axis needs, remain.

    Arguments:
        elements: every width is a multiple of so many elements; experts, which are whole matrices, and groups of units
            are removed one by one, and units that may all be removed as in :func:`step_of`.
    """
    group = 1 if axis.grouping else step_of(axis, elements // gcd(elements, axis.unit))
    step = lcm(group, axis.multiple) if axis.active is None else axis.multiple
    widest = (axis.size - 1) // step * step
    return list(range(widest, max(least, axis.fewest) - 1, -step))


def step_of(axis: Axis, units: int) -> int:
    """``units``, or the eighth of an axis whose units may all be removed, if that is less: a state is far narrower than
    the channels that group sizes are meant for."""
    return units if axis.fewest else min(units, max(1, axis.size // 8))


def narrowed(cuts: Iterable[tuple[str, int]]) -> Subnet:
    """The sub-network after cuts of (axis, units that remain), in the order they are made."""
    return Subnet(keep=tuple(sorted(dict(cuts).items())))


def cut_until(cuts: Sequence[tuple[str, int]], removed: Callable[[Subnet], float], ratio: float) -> Subnet | None:
    """The sub-network after the fewest of ``cuts``, in order, that bring ``removed`` to the ratio; None if all of them
    do not.

    It ends less than one unit above the ratio. One unit is the smallest group that could be removed next from the end
    of any axis, or restored. A cut that would exceed the ratio by more is skipped, together with the later cuts on its
    axis.

    Arguments:
        removed: the share that a sub-network removes.
    """
    least = ratio - TOLERANCE
    count = bisect_left(range(len(cuts) + 1), least, key=lambda n: removed(narrowed(cuts[:n])))
    if count > len(cuts):
        return None
    done, pending = list(cuts[: max(0, count - 1)]), list(cuts[max(0, count - 1) :])
    while (now := removed(narrowed(done))) < least:
        nexts = {axis: (axis, units) for axis, units in reversed(pending)}  # the first pending cut of each axis
        gains = {cut: removed(narrowed([*done, cut])) - now for cut in nexts.values()}
        small = (cut for cut in pending if gains.get(cut, inf) < least - now + min(gains.values()))
        done.append(next(small))
        pending.remove(done[-1])
    while True:
        lasts = {axis: (axis, units) for axis, units in done}.values()
        fewer = [[cut for cut in done if cut != last] for last in lasts]
        fit = [cuts for cuts in fewer if removed(narrowed(cuts)) >= least]
        if not fit:
            return narrowed(done)
        done = min(fit, key=lambda cuts: removed(narrowed(cuts)))
