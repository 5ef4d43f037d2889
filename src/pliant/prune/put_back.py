"""Choose which removed units to put back, so that a search ends within one unit of its ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from pliant.elastic import Subnet
from pliant.errors import RatioError
from pliant.prune.ratio_target import TOLERANCE, Budget


@dataclass(frozen=True)
class Removal:
    """One committed move.

    Attributes:
        unit: name of the removed unit.
        before: the sub-network that still had it.
        after: the sub-network without it.
        hurt: the loss increase of its removal, or the method's own measure of it; NaN if unknown.
    """

    unit: str
    before: Subnet
    after: Subnet
    hurt: float

    @property
    def blocks(self) -> frozenset[str]:
        """Blocks that the move changed."""
        axes = {axis for axis, _ in set(self.before.keep) ^ set(self.after.keep)}
        return (self.before.skip ^ self.after.skip) | {axis.rpartition(".")[0] for axis in axes}

    def undone(self, subnet: Subnet) -> Subnet:
        """``subnet`` with the blocks of this move as they were before it."""
        blocks = self.blocks
        keep = [axis for axis in subnet.keep if axis[0].rpartition(".")[0] not in blocks]
        keep += [axis for axis in self.before.keep if axis[0].rpartition(".")[0] in blocks]
        return Subnet((subnet.skip - blocks) | (self.before.skip & blocks), tuple(sorted(keep)))


def put_backs(budget: Budget, removals: Sequence[Removal], ratio: float, unit: int) -> list[Removal]:
    """Removals to undo, in this order, to end at ``ratio`` or less than one unit above it.

    Only as many as needed are undone. Of the removals whose undoing leads there, the one with the largest loss increase
    comes first; of equal ones the latest. Moves on the same block are undone in reverse order.

    Arguments:
        removals: all moves in the order they were made; the last one reached at least ``ratio``.
        unit: cost of the smallest unit.

    Raises:
        RatioError: no selection of these removals ends there.
    """
    dense = budget.dense
    removed = dense - budget.size(removals[-1].after) if removals else 0
    excess = _excess(removed, dense, ratio)
    if excess < unit:
        return []
    saved = [max(0, budget.size(removal.before) - budget.size(removal.after)) for removal in removals]
    chains = _chains(removals)
    back: list[Removal] = []
    while excess >= unit:
        # the last move of each chain can be undone next
        lasts = sorted(
            (chain[-1] for chain in chains if chain), key=lambda i: (_known(removals[i].hurt), i), reverse=True
        )
        for last in lasts:
            rest = excess - saved[last]
            shorter = [chain[:-1] if chain[-1:] == [last] else chain for chain in chains]
            if rest >= 0 and _fills(shorter, saved, rest, unit):
                break
        else:
            raise RatioError(_refusal(chains, saved, removed, dense, ratio, unit))
        excess, chains = rest, shorter
        back.append(removals[last])
    return back


def _excess(removed: int, dense: int, ratio: float) -> int:
    """Cost that may be put back."""
    return math.floor(removed - (ratio - TOLERANCE) * dense)


def _known(hurt: float) -> float:
    return -math.inf if math.isnan(hurt) else hurt


def _chains(removals: Sequence[Removal]) -> list[list[int]]:
    """Indices of the removals that changed the same blocks, in order."""
    chains: list[tuple[frozenset[str], list[int]]] = []
    for index, removal in enumerate(removals):
        same = [chain for chain in chains if chain[0] & removal.blocks]
        merged = frozenset().union(removal.blocks, *(blocks for blocks, _ in same))
        indices = sorted([index, *(i for _, of_chain in same for i in of_chain)])
        chains = [chain for chain in chains if chain not in same] + [(merged, indices)]
    return [indices for _, indices in chains]


def _sums(chains: Sequence[Sequence[int]], saved: Sequence[int], most: int, part: int) -> int:
    """Sizes that undoing ends of the chains can restore: bit ``n`` is set for a cost of ``n * part``, up to
    ``most``."""
    bits, mask = 1, (1 << (most // part + 1)) - 1
    for chain in chains:
        grown, back = bits, 0
        for index in reversed(chain):
            back += saved[index]
            if back > most:
                break
            grown |= bits << (back // part)
        bits = grown & mask
    return bits


def _fills(chains: Sequence[Sequence[int]], saved: Sequence[int], excess: int, unit: int) -> bool:
    """Whether undoing can restore at most ``excess`` and leave less than one unit of it."""
    part = _part(saved)
    return excess - (_sums(chains, saved, excess, part).bit_length() - 1) * part < unit


def _part(saved: Sequence[int]) -> int:
    return max(1, reduce(math.gcd, saved, 0))


def _refusal(
    chains: Sequence[Sequence[int]], saved: Sequence[int], removed: int, dense: int, ratio: float, unit: int
) -> str:
    part = _part(saved)
    excess = _excess(removed, dense, ratio)
    bits = _sums(chains, saved, removed, part)
    above = (bits & ((1 << (excess // part + 1)) - 1)).bit_length() - 1
    more = bits >> (excess // part + 1)
    below = excess // part + (more & -more).bit_length()  # position of the lowest bit
    # rounded down, so that the same selection still reaches a ratio that is given as printed
    nearest = [math.floor((removed - bit * part) / dense * 1e4) / 1e4 for bit in (below, above)]
    shown = " or ".join(f"{near:.4f}" for near in nearest if near > 0)
    return (
        f"ratio {ratio} cannot be reached within one unit, which is {unit / dense:.4f}: the nearest ratio of the "
        f"removed units is {shown}; give one of these"
    )
