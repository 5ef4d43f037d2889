"""Greedy removal: at every step score the possible moves and take the one that increases the loss least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pliant.elastic import Subnet
from pliant.errors import WeightError
from pliant.searches.search import Candidates, Search

MODES = ("lazy", "exact", "naive")


@dataclass(frozen=True)
class Move:
    """A possible removal.

    Attributes:
        unit: name of the block or of the axis. The same axis may be offered again later, for its next group.
        subnet: the sub-network after the removal.
    """

    unit: str
    subnet: Subnet


@dataclass
class Greedy(Search):
    """Remove units from ``start`` while ``more(subnet)`` is true and moves are left.

    The first value of a candidate is its loss. A loss that is not finite never wins.

    Arguments:
        start: the first candidate.
        moves: the possible moves, every kind in the order of the model; of equal scores the earliest wins.
        more: whether another unit has to be removed.
        gain: savings of a move, above 0; the move with the smallest loss increase per gain wins.
        mode: ``naive`` and ``exact`` score every move at every step (they differ only in whether the scorer re-uses
            prefixes). ``lazy`` remembers the loss increase of each unit from when it was last scored: it scores only
            units that may be best, and the neighbours of the last removed unit, whose loss increase changes most.
        slack: lazy: share by which the loss increase of a unit is assumed to fall at most since it was last scored.
        refresh: lazy: number of steps after which every unit is scored again; 0 for never.

    Attributes:
        subnet: the sub-network so far.
        taken: every move made, and the loss after it.
    """

    start: Subnet
    moves: Callable[[Subnet], Sequence[Move]]
    more: Callable[[Subnet], bool]
    gain: Callable[[Subnet, Move], float] = lambda _subnet, _move: 1.0
    mode: str = "lazy"
    slack: float = 0.3
    refresh: int = 16
    taken: list[tuple[Move, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; not {self.mode!r}")
        if not 0 <= self.slack <= 1:
            raise ValueError(f"slack must be a number from 0 to 1; not {self.slack}")
        if self.refresh < 0:
            raise ValueError(f"refresh must be at least 0; not {self.refresh}")
        self.subnet = self.start

    def candidates(self) -> Candidates:
        """The start, then at every step the moves that may be best.

        Raises:
            WeightError: the loss of the start is not finite, or no move has a finite loss.
        """
        yield [self.start]
        loss = self.seen[self.start][0]
        check_loss(loss)
        last: dict[str, float] = {}  # loss increase of each unit when it was last scored
        step = 0
        while self.more(self.subnet):
            offered = self.moves(self.subnet)
            if not offered:
                break
            gains = [self.gain(self.subnet, move) for move in offered]
            afresh = self.mode != "lazy" or step == 0 or (self.refresh > 0 and step % self.refresh == 0)
            known = {} if afresh else last
            # lower bounds on the loss increase per gain of each move
            bounds = [
                self._bound(known.get(move.unit, -math.inf)) / saved for move, saved in zip(offered, gains, strict=True)
            ]
            best: tuple[float, int, float] = (math.inf, -1, math.inf)
            for i in sorted(range(len(offered)), key=bounds.__getitem__):
                if bounds[i] > best[0]:
                    break
                yield [offered[i].subnet]
                value = self.seen[offered[i].subnet][0]
                last[offered[i].unit] = value - loss if math.isfinite(value) else math.inf
                if math.isfinite(value):
                    best = min(best, ((value - loss) / gains[i], i, value))
            if best[1] < 0:
                raise WeightError("no removal leaves a finite loss; check the model's weights and the calibration text")
            move = offered[best[1]]
            for neighbour in offered[max(0, best[1] - 1) : best[1] + 2]:
                if neighbour != move:
                    last.pop(neighbour.unit, None)  # its loss increase has changed too much
            self.subnet, loss = move.subnet, best[2]
            self.taken.append((move, loss))
            step += 1

    def _bound(self, increase: float) -> float:
        """A lower bound on the current loss increase of a unit, from its last one."""
        return increase - self.slack * abs(increase) if math.isfinite(increase) else increase


def check_loss(loss: float) -> None:
    """Raise if the loss of the model, or a value computed from it, is not finite.

    Raises:
        WeightError: it is not finite.
    """
    if not math.isfinite(loss):
        raise WeightError(f"the model's loss on the calibration text is {loss}; check the model's weights and the text")
