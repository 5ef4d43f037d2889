"""Allocation by knapsack: measure what every block costs in loss at a few widths, then solve for the best mix."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pliant.anatomy import Anatomy, Block
from pliant.elastic import Subnet, parameters
from pliant.errors import RatioError
from pliant.search.greedy import Move
from pliant.search.groups import widths
from pliant.search.moves import block_moves
from pliant.search.order import ordered
from pliant.search.pruner import OrderedPruner
from pliant.search.pruning import Pruning, Scorer
from pliant.step import Job

STEPS = 20_000  # the budget is counted in so many parts
FINE = 96  # parts of a block's width, between the measured ones
DRAWN = 16  # trades, of which the one that the measured damages speak for is scored


Kept = tuple[tuple[str, int], ...] | None
Curves = dict[str, list["Choice"]]


@dataclass(frozen=True)
class Choice:
    """One thing that can be done with a block.

    Attributes:
        kept: units kept of each axis, by full name; None when the block goes.
        saved: parameters it saves.
        damage: nats per token that the loss rises by, with this alone done to the dense model.
    """

    kept: Kept
    saved: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class KnapsackPruner(OrderedPruner):
    """Every block at a few widths, or gone: a multiple-choice knapsack over damages measured one at a time, and those between
    them, then swaps that are scored for real.

    The damages are taken to add up, which is nearly true of widths and less so of whole blocks. So a mix with whole blocks gone
    and one without are both scored, and the swaps start from the better.
    """

    kind: ClassVar[str] = "knapsack"

    levels: int = 4
    """Widths at which the axes of a block are tried, besides whole and gone."""

    swaps: int = 32
    """Trades of width between two blocks that are scored, and kept when the loss falls."""

    group: int = 32
    """Elements that come and go together, and what is left is a multiple of; heads go one key-value group at a time."""

    order: str = "activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(levels=0, swaps=0, group=1)

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        windows = self.windows(job, self.samples, self.seed)
        with ordered(job, pruning.anatomy, self.order, windows):
            with pruning.scoring("knapsack", windows) as score:
                subnet, loss = self._allocate(pruning, score)
            pruning.commit("knapsack", Move("all", subnet), loss)
            self.finish(pruning, job)

    def _allocate(self, pruning: Pruning, score: Scorer) -> tuple[Subnet, float]:
        dense = score(Subnet())
        menus = self._menus(pruning)
        curves: Curves = {}
        for done, (name, menu) in enumerate(menus.items(), 1):
            measured = [Choice(kept, saved, score(apply_choice(Subnet(), name, kept)) - dense) for kept, saved in menu]
            curves[name] = self._filled(pruning.anatomy.blocks[name], measured)
            pruning.job.progress.step(done / len(menus), f"{done} of {len(menus)} blocks measured")
        target = self.ratio * parameters(pruning.anatomy)
        narrow = {name: [choice for choice in curve if choice.kept is not None] for name, curve in curves.items()}
        mixes = []
        for menu in (curves, narrow):
            chosen = solve(list(menu.values()), target)
            if chosen is not None:
                mixes.append(dict(zip(curves, chosen, strict=True)))
        if not mixes:
            raise RatioError(f"ratio {self.ratio} cannot be reached with every block at its smallest")
        loss, _, picked = min((score(_subnet(curves, mix)), place, mix) for place, mix in enumerate(mixes))
        return self._swap(pruning, curves, picked, loss, target, score)

    def _menus(self, pruning: Pruning) -> dict[str, list[tuple[Kept, int]]]:
        """What is measured of each block, and the parameters it saves; the first is nothing."""
        anatomy = pruning.anatomy
        free = {move.unit for move in block_moves(anatomy)(Subnet())}
        stays = _last_of_type(anatomy)
        menus = {}
        for block in anatomy.blocks.values():
            menu: list[tuple[Kept, int]] = [((), 0)]
            for level in range(1, self.levels + 1):
                kept, saved = _narrowed(block, level / (self.levels + 1), self.group)
                if saved > menu[-1][1]:
                    menu.append((kept, saved))
            if block.name in free and block.name not in stays:
                menu.append((None, block.parameters({})))
            if len(menu) > 1:
                menus[block.name] = menu
        return menus

    def _filled(self, block: Block, measured: list[Choice]) -> list[Choice]:
        """What was measured and every width between, by what it saves."""
        points = [choice for choice in measured if choice.kept is not None]
        found = {choice.saved: choice for choice in measured}
        for part in range(1, FINE):
            kept, saved = _narrowed(block, part / FINE, self.group)
            if saved < points[-1].saved and saved not in found:
                above = bisect_left(points, saved, key=lambda choice: choice.saved)
                found[saved] = Choice(kept, saved, _between(points[above - 1], points[above], saved))
        return [found[saved] for saved in sorted(found)]

    def _swap(
        self, pruning: Pruning, curves: Curves, picked: dict[str, int], loss: float, target: float, score: Scorer
    ) -> tuple[Subnet, float]:
        """Let blocks trade width, one narrower and one wider, while the loss falls and the ratio holds."""
        draw = random.Random(self.seed)
        tried = [picked]
        for done in range(self.swaps):
            trades = [trade for _ in range(DRAWN) if (trade := self._trade(draw, curves, picked, target)) is not None]
            trades = [trade for trade in trades if trade not in tried]
            if not trades:
                continue
            trade = min(trades, key=lambda trade: _total(curves, trade)[1])
            tried.append(trade)
            value = score(_subnet(curves, trade))
            if value < loss:
                picked, loss = trade, value
            pruning.job.progress.step((done + 1) / self.swaps, f"swap {done + 1} of {self.swaps}, loss {loss:.4f}")
        return _subnet(curves, picked), loss

    def _trade(
        self, draw: random.Random, curves: Curves, picked: dict[str, int], target: float
    ) -> dict[str, int] | None:
        """One block narrower by a measured step, a half or a quarter of it, another wider by as much as that leaves to spare."""
        down, up = draw.sample(list(curves), 2)
        less, more = curves[down], curves[up]
        step = less[-1].saved / (self.levels + 1) / draw.choice((1, 2, 4))
        wanted = less[picked[down]].saved + step
        narrower = min(range(len(less)), key=lambda place: abs(less[place].saved - wanted))
        spare = _total(curves, {**picked, down: narrower})[0] - target
        wider = bisect_left(more, more[picked[up]].saved - spare, key=lambda choice: choice.saved)
        return {**picked, down: narrower, up: wider} if narrower > picked[down] and wider < picked[up] else None


def _total(curves: Curves, picked: dict[str, int]) -> tuple[int, float]:
    """Parameters saved, and nats per token if damages added up."""
    chosen = [curves[name][place] for name, place in picked.items()]
    return sum(choice.saved for choice in chosen), sum(choice.damage for choice in chosen)


def _between(below: Choice, above: Choice, saved: int) -> float:
    """Damage between two measured widths, on a power law through both, since it rises ever faster; below the first on a
    square, as units that matter little go first. Where the measured damages do not rise, on a line."""
    if below.saved == 0:
        return above.damage * (saved / above.saved) ** 2
    if 0 < below.damage < above.damage:
        return below.damage * (saved / below.saved) ** (
            math.log(above.damage / below.damage) / math.log(above.saved / below.saved)
        )
    return below.damage + (above.damage - below.damage) * (saved - below.saved) / (above.saved - below.saved)


def solve(menus: Sequence[Sequence[Choice]], target: float) -> list[int] | None:
    """The choice of each block with the least total damage that saves at least ``target`` parameters.

    Dynamic programming over savings rounded down to 1/20000 of the target, so that the result always saves enough.

    Returns:
        The place of the choice in each menu, or None when even the largest savings do not come to the target.
    """
    unit = target / STEPS
    best = np.full(STEPS + 1, np.inf)
    best[0] = 0.0
    picks: list[np.ndarray] = []
    for menu in menus:
        after = np.full(STEPS + 1, np.inf)
        pick = np.zeros(STEPS + 1, dtype=np.int32)
        came = np.zeros(STEPS + 1, dtype=np.int32)
        for place, choice in enumerate(menu):
            if not np.isfinite(choice.damage):
                continue
            steps = min(int(choice.saved / unit), STEPS)
            short = STEPS - steps  # from here on it saves enough
            rest = short + int(best[short:].argmin())
            came_from = np.append(np.arange(short), rest)
            reached = np.arange(steps, STEPS + 1)
            damage = best[came_from] + choice.damage
            better = damage < after[reached]
            after[reached[better]] = damage[better]
            pick[reached[better]] = place
            came[reached[better]] = came_from[better]
        picks.append(np.stack([pick, came]))
        best = after
    if not np.isfinite(best[STEPS]):
        return None
    chosen, at = [], STEPS
    for table in reversed(picks):
        chosen.append(int(table[0, at]))
        at = int(table[1, at])
    return chosen[::-1]


def apply_choice(subnet: Subnet, block: str, kept: tuple[tuple[str, int], ...] | None) -> Subnet:
    """``subnet`` with one more choice made."""
    if kept is None:
        return subnet.without(block)
    for axis, units in kept:
        subnet = subnet.keeping(axis, units)
    return subnet


def _subnet(curves: dict[str, list[Choice]], picked: dict[str, int]) -> Subnet:
    subnet = Subnet()
    for block, place in picked.items():
        subnet = apply_choice(subnet, block, curves[block][place].kept)
    return subnet


def _narrowed(block: Block, gone: float, group: int) -> tuple[tuple[tuple[str, int], ...], int]:
    """About a share of every axis of a block gone, as far as its units allow, and the parameters that saves."""
    nearest = {
        axis: min([axis.size, *widths(axis, group)], key=lambda units: abs(axis.size * (1 - gone) - units))
        for axis in block.leaders
    }
    short = {axis: units for axis, units in nearest.items() if units < axis.size}
    saved = block.parameters({}) - block.parameters({axis.leader: units for axis, units in short.items()})
    return tuple((axis.name, units) for axis, units in short.items()), saved


def _last_of_type(anatomy: Anatomy) -> set[str]:
    """The last attention of each type: it stays, so that no mix of choices removes them all."""
    last = {anatomy.layer_types[b.layer]: b.name for b in anatomy.blocks.values() if b.spec.slot}
    return set(last.values())
