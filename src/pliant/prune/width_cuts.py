"""Groups of units that come and go together, and how many of them have to go."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from math import gcd, inf, lcm

from pliant.anatomy import Axis
from pliant.elastic import Subnet


def widths(axis: Axis, elements: int, least: int = 1) -> list[int]:
    """Units left of an axis after one group more is gone from its end, and one more, as long as ``least`` and what a token
    needs stay.

    Arguments:
        elements: what is left is a multiple of so many elements; experts, which are whole matrices, go one by one.
    """
    step = lcm(elements // gcd(elements, axis.unit), axis.multiple) if axis.active is None else axis.multiple
    widest = (axis.size - 1) // step * step
    return list(range(widest, max(least, axis.active or 1) - 1, -step))


def narrowed(cuts: Iterable[tuple[str, int]]) -> Subnet:
    """The sub-network after cuts of (axis, units left), in the order they are made."""
    return Subnet(keep=tuple(sorted(dict(cuts).items())))


def cut_until(cuts: Sequence[tuple[str, int]], reached: Callable[[Subnet], float], target: float) -> Subnet | None:
    """The sub-network after the fewest of ``cuts``, in order, that bring ``reached`` to the target; None if all of them do not.

    It ends less than one unit above the target. One unit is the smallest group that could be removed next from the end of any axis,
    or restored. A cut that would exceed the target by more is skipped, together with the later cuts on its axis.
    """
    count = bisect_left(range(len(cuts) + 1), target - 1e-12, key=lambda n: reached(narrowed(cuts[:n])))
    if count > len(cuts):
        return None
    done, left = list(cuts[: max(0, count - 1)]), list(cuts[max(0, count - 1) :])
    while (now := reached(narrowed(done))) < target - 1e-12:
        nexts = {axis: (axis, units) for axis, units in reversed(left)}  # the first remaining cut of each axis
        gains = {cut: reached(narrowed([*done, cut])) - now for cut in nexts.values()}
        small = (cut for cut in left if gains.get(cut, inf) < target - now + min(gains.values()) - 1e-12)
        done.append(next(small))
        left.remove(done[-1])
    while True:
        lasts = {axis: (axis, units) for axis, units in done}.values()
        fewer = [[cut for cut in done if cut != last] for last in lasts]
        fit = [cuts for cuts in fewer if reached(narrowed(cuts)) >= target - 1e-12]
        if not fit:
            return narrowed(done)
        done = min(fit, key=lambda cuts: reached(narrowed(cuts)))
