"""Allocation by knapsack: measure what every block costs in loss at a few widths, then solve for the best mix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from pliant.anatomy import Anatomy, Block
from pliant.elastic import Subnet, parameters, ratio
from pliant.errors import RatioError
from pliant.prune.moves import Moves, block_moves, settled, step_moves, unit_of
from pliant.prune.session import Pruning, Scorer
from pliant.prune.settings import OrderedPruner
from pliant.prune.unit_order import ordered
from pliant.prune.width_cuts import widths
from pliant.searches.greedy import Move, check_loss
from pliant.step import Job, setting

STEPS = 4000  # the budget is counted in so many parts


@dataclass(frozen=True)
class Choice:
    """One thing that can be done with a block.

    Attributes:
        kept: units kept of each axis, by full name; None when the block goes.
        saved: parameters it saves.
        damage: nats per token that the loss rises by, with this alone done to the dense model.
    """

    kept: tuple[tuple[str, int], ...] | None
    saved: int
    damage: float


class KnapsackPruner(OrderedPruner):
    """Every block at a few widths, or gone: a multiple-choice knapsack over damages measured one at a time, then swaps
    that are scored for real.

    The loss increases are assumed to add up, which nearly holds for widths and less so for whole blocks; swaps correct for this.
    If the chosen widths remove more than the ratio, groups are restored one by one.
    """

    kind: ClassVar[str] = "knapsack"

    levels: int = setting(
        "Widths at which the axes of a block are tried, besides whole and gone.", default=4, at_least=0
    )

    swaps: int = setting(
        "Pairs of blocks that trade a step of width, kept when the loss falls.", default=32, at_least=0
    )

    group: int = setting(
        "Elements that come and go together, and what is left is a multiple of; heads go one key-value "
        "group at a time.",
        default=32,
        at_least=1,
    )

    order: str = "activation"

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:
        return 0.6 * self.samples * row * (blocks * (self.levels + 1) + self.swaps), False

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        windows = self.windows(job, self.samples, self.seed)
        with ordered(job, pruning.anatomy, self.order, windows):
            with pruning.scoring("knapsack", windows) as score:
                subnet, loss = self._allocate(pruning, score)
            pruning.commit("knapsack", Move("all", subnet), loss)
            self.finish(pruning, job, self._moves(pruning.anatomy))

    def _allocate(self, pruning: Pruning, score: Scorer) -> tuple[Subnet, float]:
        menus = self._menus(pruning)
        wanted, most = self.ratio * parameters(pruning.anatomy), sum(menu[-1][1] for menu in menus.values())
        if most < wanted:
            raise RatioError(
                f"ratio {self.ratio} cannot be reached: every block at its smallest comes to {most / parameters(pruning.anatomy):.4f}"
            )
        check_loss(dense := score(Subnet()))
        curves = {}
        for done, (name, menu) in enumerate(menus.items(), 1):
            curves[name] = [
                Choice(kept, saved, score(apply_choice(Subnet(), name, kept)) - dense) for kept, saved in menu
            ]
            pruning.job.progress.step(done / len(menus), f"{done} of {len(menus)} blocks measured")
        steps = [b.saved - a.saved for menu in curves.values() for a, b in pairwise(menu)]
        chosen = solve(list(curves.values()), wanted, min(steps))
        if chosen is None:
            raise RatioError(f"ratio {self.ratio} cannot be reached: too many blocks leave no finite loss")
        return self._swap(pruning, curves, dict(zip(curves, chosen, strict=True)), score)

    def _menus(self, pruning: Pruning) -> dict[str, list[tuple[tuple[tuple[str, int], ...] | None, int]]]:
        """What can be done with each block, and the parameters it saves; the first is nothing."""
        anatomy = pruning.anatomy
        free = {move.unit for move in block_moves(anatomy)(Subnet())}
        stays = _last_of_type(anatomy)
        menus = {}
        for block in anatomy.blocks.values():
            whole = block.parameters({})
            menu: list[tuple[tuple[tuple[str, int], ...] | None, int]] = [((), 0)]
            for level in range(1, self.levels + 1):
                kept = _narrowed(block, level / (self.levels + 1), self.group)
                short = {axis.leader: units for axis in block.leaders for name, units in kept if name == axis.name}
                saved = whole - block.parameters(short)
                if kept and saved > menu[-1][1]:
                    menu.append((kept, saved))
            if block.name in free and block.name not in stays:
                menu.append((None, whole))
            if len(menu) > 1:
                menus[block.name] = menu
        return menus

    def _settled(self, anatomy: Anatomy, curves: dict[str, list[Choice]], picked: dict[str, int]) -> Subnet:
        """The sub-network of the picked choices, adjusted to less than one group above the ratio."""
        axes = {axis.name: axis for name in curves for axis in anatomy.blocks[name].leaders} if self.levels else {}
        steps = {name: [axis.size, *widths(axis, self.group)] for name, axis in axes.items()}
        return settled(anatomy, _subnet(curves, picked), self.ratio, steps, curves)

    def _moves(self, anatomy: Anatomy) -> Moves:
        """One group less of each axis; whole blocks where no widths are tried."""
        return step_moves(anatomy.axes.values(), self.group) if self.levels else block_moves(anatomy)

    def _swap(
        self, pruning: Pruning, curves: dict[str, list[Choice]], picked: dict[str, int], score: Scorer
    ) -> tuple[Subnet, float]:
        """Let pairs of blocks trade a step, one narrower and one wider, while the loss falls and the ratio holds."""
        draw = random.Random(self.seed)
        anatomy = pruning.anatomy
        best = self._settled(anatomy, curves, picked)
        loss = score(best)
        unit = (unit_of(anatomy, self._moves(anatomy)) - 0.5) / parameters(anatomy)  # a whole one is too much
        for done in range(self.swaps if len(curves) > 1 else 0):
            down, up = draw.sample(list(curves), 2)
            tried = {**picked, down: picked[down] + 1, up: picked[up] - 1}
            if tried[down] >= len(curves[down]) or tried[up] < 0:
                continue
            if ratio(anatomy, _subnet(curves, tried)) < self.ratio:
                continue
            subnet = self._settled(anatomy, curves, tried)
            if ratio(anatomy, subnet) > max(ratio(anatomy, best), self.ratio + unit):
                continue
            value = score(subnet)
            if value < loss:
                picked, best, loss = tried, subnet, value
            pruning.job.progress.step((done + 1) / self.swaps, f"swap {done + 1} of {self.swaps}, loss {loss:.4f}")
        return best, loss


def solve(menus: Sequence[Sequence[Choice]], target: float, slack: float) -> list[int] | None:
    """The choice of each block with the least total damage that saves at least ``target`` parameters and little more.

    Dynamic programming over savings rounded down to 1/4000 of the target, so that the result always saves enough.

    Arguments:
        slack: parameters that may be removed beyond the target; if no combination is within it, the one that removes least is taken.

    Returns:
        The place of the choice in each menu, or None when even the largest savings do not come to the target.
    """
    unit = target / STEPS
    sizes = [[int(choice.saved / unit) for choice in menu] for menu in menus]
    # a combination that saves more than this still saves enough with one block left whole
    length = STEPS + max(max(of_menu) for of_menu in sizes) + 1
    best = np.full(length, np.inf)
    best[0] = 0.0
    picks: list[np.ndarray] = []
    for menu, of_menu in zip(menus, sizes, strict=True):
        after = np.full(length, np.inf)
        pick = np.zeros(length, dtype=np.int32)
        for place, (choice, steps) in enumerate(zip(menu, of_menu, strict=True)):
            if not np.isfinite(choice.damage) or steps >= length:
                continue
            found = best[: length - steps] + choice.damage
            better = found < after[steps:]
            after[steps:][better] = found[better]
            pick[steps:][better] = place
        picks.append(pick)
        best = after
    within = best[STEPS : STEPS + int(slack / unit) + 1]
    enough = np.flatnonzero(np.isfinite(best[STEPS:]))
    if not len(enough):
        return None
    at = STEPS + int(np.argmin(within) if np.isfinite(within).any() else enough[0])
    chosen = []
    for pick, of_menu in zip(reversed(picks), reversed(sizes), strict=True):
        chosen.append(int(pick[at]))
        at -= of_menu[chosen[-1]]
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


def _narrowed(block: Block, gone: float, group: int) -> tuple[tuple[str, int], ...]:
    """About a share of every axis of a block gone, as far as its units allow."""
    kept = []
    for axis in block.leaders:
        left = widths(axis, group)
        if left:
            kept.append((axis.name, min(left, key=lambda units: abs(axis.size * (1 - gone) - units))))
    return tuple(kept)


def _last_of_type(anatomy: Anatomy) -> set[str]:
    """The last attention of each type: it stays, so that no mix of choices removes them all."""
    last = {anatomy.layer_types[b.layer]: b.name for b in anatomy.blocks.values() if b.spec.slot}
    return set(last.values())
