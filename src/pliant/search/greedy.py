"""Greedy removal: at every step score what could go next, commit the one that hurts least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pliant.elastic import Subnet
from pliant.errors import WeightError

MODES = ("lazy", "exact", "naive")


@dataclass(frozen=True)
class Move:
    """One unit that could go next.

    Attributes:
        unit: what goes: a block or an axis name. The same unit may be offered again later, for its next group.
        subnet: the sub-network after it is gone.
    """

    unit: str
    subnet: Subnet


@dataclass(frozen=True)
class Greedy:
    """How to look.

    Attributes:
        mode: ``naive`` and ``exact`` score every move at every step (they differ only in whether the scorer re-uses
            prefixes); ``lazy`` trusts that a unit which hurt much a step ago still does.
        slack: lazy only, in nats per token: how much less than last time a unit may hurt now and still be looked at.
        refresh: lazy only: every so many steps score everything again; 0 never does.
    """

    mode: str = "lazy"
    slack: float = 0.0
    refresh: int = 16

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"there is no search mode {self.mode!r}; there are {', '.join(MODES)}")
        if not (self.slack >= 0 and self.refresh >= 0):
            raise ValueError(f"slack and refresh cannot be negative, they are {self.slack} and {self.refresh}")

    def run(
        self,
        start: Subnet,
        moves: Callable[[Subnet], Sequence[Move]],
        score: Callable[[Subnet], float],
        more: Callable[[Subnet], bool],
        committed: Callable[[Move, float], None],
    ) -> Subnet:
        """Remove units from ``start`` while ``more(subnet)`` and there are moves.

        Arguments:
            moves: what could go next; of equal scores the earliest wins.
            score: loss of a sub-network. NaN never wins.
            committed: called with every move made and its score.

        Raises:
            WeightError: when no move has a finite score.
        """
        current, loss = start, score(start)
        if not math.isfinite(loss):
            raise WeightError(f"the model's loss on the calibration text is {loss}; its weights or the text are broken")
        last: dict[str, float] = {}  # how much each unit hurt when it was last looked at
        step = 0
        while more(current):
            offered = moves(current)
            if not offered:
                break
            fresh_start = self.mode != "lazy" or (self.refresh and step and step % self.refresh == 0)
            known = {} if fresh_start else last
            ranked = sorted(range(len(offered)), key=lambda i: (known.get(offered[i].unit, -math.inf), i))
            best: tuple[float, int] = (math.inf, -1)
            for i in ranked:
                if known.get(offered[i].unit, -math.inf) > best[0] - loss + self.slack:
                    break
                value = score(offered[i].subnet)
                last[offered[i].unit] = value - loss if math.isfinite(value) else math.inf
                if math.isfinite(value):
                    best = min(best, (value, i))
            if best[1] < 0:
                raise WeightError("no removal leaves a finite loss; the model's weights or the text are broken")
            move = offered[best[1]]
            current, loss = move.subnet, best[0]
            committed(move, loss)
            step += 1
        return current
