"""Greedy removal: at every step score what could go next, commit the one that hurts least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pliant.elastic import Subnet
from pliant.errors import WeightError
from pliant.searches.search import Look, Search

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


@dataclass
class Greedy(Search):
    """Remove units from ``start`` while ``more(subnet)`` and there are moves.

    The first value that is told of a candidate is its loss. NaN never wins.

    Arguments:
        start: the first candidate.
        moves: what could go next, every kind in the order of the model; of equal scores the earliest wins.
        more: whether one more unit should go.
        gain: what a move saves, above 0; the move with the least damage per gain wins.
        mode: ``naive`` and ``exact`` score every move at every step (they differ only in whether the scorer re-uses
            prefixes); ``lazy`` trusts that a unit which hurt much a step ago still does: it scores only what may be best, and
            the units on either side of what went last, whose damage changes most.
        slack: lazy: by which share less than last time a unit may hurt now and still be scored.
        refresh: lazy: every so many steps score everything again; 0 never does.

    Attributes:
        subnet: what is left so far.
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

    def look(self) -> Look:
        """Raises:
        WeightError: when no move has a finite score.
        """
        yield [self.start]
        loss = self.seen[self.start][0]
        check_loss(loss)
        last: dict[str, float] = {}  # how much each unit hurt when it was last scored
        step = 0
        while self.more(self.subnet):
            offered = self.moves(self.subnet)
            if not offered:
                break
            gains = [self.gain(self.subnet, move) for move in offered]
            afresh = self.mode != "lazy" or step == 0 or (self.refresh > 0 and step % self.refresh == 0)
            known = {} if afresh else last
            # the least damage per gain that a move may turn out to have
            hopes = [
                self._hope(known.get(move.unit, -math.inf)) / saved for move, saved in zip(offered, gains, strict=True)
            ]
            best: tuple[float, int, float] = (math.inf, -1, math.inf)
            for i in sorted(range(len(offered)), key=hopes.__getitem__):
                if hopes[i] > best[0]:
                    break
                yield [offered[i].subnet]
                value = self.seen[offered[i].subnet][0]
                last[offered[i].unit] = _damage(value, loss)
                if math.isfinite(value):
                    best = min(best, ((value - loss) / gains[i], i, value))
            if best[1] < 0:
                raise WeightError("no removal leaves a finite loss; the model's weights or the text are broken")
            move = offered[best[1]]
            for neighbour in offered[max(0, best[1] - 1) : best[1] + 2]:
                if neighbour != move:
                    last.pop(neighbour.unit, None)  # no longer to be trusted
            self.subnet, loss = move.subnet, best[2]
            self.taken.append((move, loss))
            step += 1

    def _hope(self, damage: float) -> float:
        """The least that a unit which hurt so much may hurt by now."""
        return damage - self.slack * abs(damage) if math.isfinite(damage) else damage


def check_loss(loss: float) -> None:
    """Refuse to choose by a loss of the whole model, or by what is made of it, that is no number.

    Raises:
        WeightError: it is not finite.
    """
    if not math.isfinite(loss):
        raise WeightError(f"the model's loss on the calibration text is {loss}; its weights or the text are broken")


def _damage(loss: float, before: float) -> float:
    return loss - before if math.isfinite(loss) else math.inf
