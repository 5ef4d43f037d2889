"""Greedy removal: at every step score what could go next, commit the one that hurts least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pliant.elastic import Subnet
from pliant.errors import WeightError

MODES = ("lazy", "racing", "exact", "naive")


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
            prefixes); ``lazy`` trusts that a unit which hurt much a step ago still does: it scores only what may be best, and the
            units on either side of what went last, whose damage changes most; ``racing`` is lazy and, where lazy would
            score everything, scores it roughly first and only the better quarter in full.
        slack: lazy and racing: by which share less than last time a unit may hurt now and still be looked at.
        refresh: lazy and racing: every so many steps look at everything again; 0 never does.
    """

    mode: str = "lazy"
    slack: float = 0.3
    refresh: int = 16

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"there is no search mode {self.mode!r}; there are {', '.join(MODES)}")
        if not (0 <= self.slack <= 1 and self.refresh >= 0):
            raise ValueError(f"slack is from 0 to 1 and refresh not negative; they are {self.slack} and {self.refresh}")

    def run(
        self,
        start: Subnet,
        moves: Callable[[Subnet], Sequence[Move]],
        score: Callable[[Subnet], float],
        more: Callable[[Subnet], bool],
        committed: Callable[[Move, float], None],
        *,
        gain: Callable[[Subnet, Move], float] = lambda _subnet, _move: 1.0,
        rough: Callable[[Subnet], float] | None = None,
    ) -> Subnet:
        """Remove units from ``start`` while ``more(subnet)`` and there are moves.

        Arguments:
            moves: what could go next, every kind in the order of the model; of equal scores the earliest wins.
            score: loss of a sub-network. NaN never wins.
            committed: called with every move made and its score.
            gain: what a move saves, above 0; the move with the least damage per gain wins.
            rough: a cheaper estimate of ``score``, for racing.

        Raises:
            WeightError: when no move has a finite score.
        """
        current, loss = start, score(start)
        check_loss(loss)
        last: dict[str, float] = {}  # how much each unit hurt when it was last looked at
        step = 0
        while more(current):
            offered = moves(current)
            if not offered:
                break
            gains = [gain(current, move) for move in offered]
            lazy = self.mode in ("lazy", "racing")
            afresh = not lazy or step == 0 or (self.refresh > 0 and step % self.refresh == 0)
            known = {} if afresh else last
            least = 0  # moves that are scored whatever is known of them
            if afresh and self.mode == "racing" and rough is not None:
                before = rough(current)
                known = {move.unit: _damage(rough(move.subnet), before) for move in offered}
                last |= known
                least = -(-len(offered) // 4)

            # the least damage per gain that a move may turn out to have
            hopes = [
                self._hope(known.get(move.unit, -math.inf)) / saved for move, saved in zip(offered, gains, strict=True)
            ]
            ranked = sorted(range(len(offered)), key=hopes.__getitem__)
            best: tuple[float, int, float] = (math.inf, -1, math.inf)
            for place, i in enumerate(ranked):
                if place >= least and hopes[i] > best[0]:
                    break
                value = score(offered[i].subnet)
                last[offered[i].unit] = _damage(value, loss)
                if math.isfinite(value):
                    best = min(best, ((value - loss) / gains[i], i, value))
            if best[1] < 0:
                raise WeightError("no removal leaves a finite loss; the model's weights or the text are broken")
            move = offered[best[1]]
            for neighbour in offered[max(0, best[1] - 1) : best[1] + 2]:
                if neighbour != move:
                    last.pop(neighbour.unit, None)  # no longer to be trusted
            current, loss = move.subnet, best[2]
            committed(move, loss)
            step += 1
        return current

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
