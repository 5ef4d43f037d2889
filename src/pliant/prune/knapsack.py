"""Allocation by knapsack: measure the loss of every block at a few widths, then solve for the best mix."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

from pliant.anatomy import Anatomy, Axis
from pliant.elastic import Subnet, parameters, ratio
from pliant.errors import RatioError
from pliant.prune.moves import Moves, block_moves, settled, step_moves, unit_of
from pliant.prune.ratio_target import by_parameters, out_of_reach
from pliant.prune.scan_skip import scan_axis, scans_of
from pliant.prune.session import Pruning, Scorer
from pliant.prune.settings import OrderedPruner, Pruner
from pliant.prune.unit_order import ordered
from pliant.prune.width_cuts import narrowed, widths
from pliant.searches import Allocation, HillClimb, Move, Space
from pliant.step import Job
from pliant.step_setting import setting

Menus = Mapping[str, Sequence[Subnet]]
"""Block -> the dense model, then models with ever less of the block."""


class KnapsackPruner(OrderedPruner, Pruner):
    """Choose a width for every block, or remove it: a multiple-choice knapsack over loss increases measured one at a
    time, then swaps that are scored together.

    The loss increases are assumed to add up, which nearly holds for widths and less so for whole blocks; swaps correct
    for this. If the chosen widths remove more than the ratio, groups are restored one by one.
    """

    levels: int = setting(
        "Widths at which the axes of a block are scored, besides the full width and none; so are as many numbers of "
        "groups, and a scan without its state.",
        default=4,
        at_least=0,
    )

    swaps: int = setting(
        "Pairs of blocks that trade a step of width, kept when the loss falls.", default=32, at_least=0
    )

    group: int = setting(
        "Every remaining width is a multiple of so many elements; heads are removed one key-value group at a time.",
        default=32,
        at_least=1,
    )

    order: str = "activation"

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:
        return 0.6 * self.samples * row * (blocks * (self.levels + 1) + self.swaps), False

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        menus = self._menus(pruning.anatomy)
        self._check(pruning.anatomy, menus)
        windows = self.windows(job, self.samples, self.seed)
        total = sum(len(menu) - 1 for menu in menus.values()) + self.swaps

        def show(scorer: Scorer) -> None:
            job.progress.step(min(1.0, scorer.seen / total), f"{scorer.seen} of at most {total} scored")

        with ordered(job, pruning.anatomy, self.order, windows):
            with pruning.scoring("knapsack", windows, on_score=show) as score:
                subnet, loss = self._allocate(pruning, menus, score)
            pruning.commit("knapsack", Move("all", subnet), loss)
            self.finish(pruning, job, self._moves(pruning.anatomy))

    def _menus(self, anatomy: Anatomy) -> Menus:
        """The choices for each block, alone."""
        free = {block.name for block in anatomy.may_all_go()}
        states = {axis.name for block in scans_of(anatomy) if (axis := scan_axis(block)) is not None}
        menus: dict[str, list[Subnet]] = {}
        shared: set[str] = set()  # an axis of several blocks is offered once
        for block in anatomy.blocks.values():
            axes = [axis for axis in block.leaders if axis.name not in shared]
            shared.update(axis.name for axis in axes)
            # groups are not removed together with units of those that stay
            kinds = [[axis for axis in axes if axis.grouping is grouping] for grouping in (False, True)]
            shares = [level / (self.levels + 1) for level in range(1, self.levels + 1)]
            choices = [_narrower(of_kind, share, self.group) for of_kind in kinds for share in shares]
            if self.levels:
                choices += [Subnet().keeping(axis.name, 0) for axis in axes if axis.name in states]
            choices.sort(key=lambda choice: -parameters(anatomy, choice))
            if block.name in free:
                choices.append(Subnet().without(block.name))
            menu = [Subnet()]
            for choice in choices:
                if parameters(anatomy, choice) < parameters(anatomy, menu[-1]):
                    menu.append(choice)  # one of several tied blocks saves nothing alone
            if len(menu) > 1:
                menus[block.name] = menu
        return menus

    def _check(self, anatomy: Anatomy, menus: Menus) -> None:
        """Refuse a ratio that the menus do not reach, before anything is scored."""
        most = sum(ratio(anatomy, menu[-1]) for menu in menus.values())
        if most < self.ratio:
            raise out_of_reach(self.ratio, most, "the smallest choice of every block")

    def _allocate(self, pruning: Pruning, menus: Menus, score: Scorer) -> tuple[Subnet, float]:
        """Solve for the best mix of choices measured one at a time, then let pairs of blocks trade a step, one narrower
        and one wider, while the loss falls and the ratio holds."""
        anatomy, parts = pruning.anatomy, list(menus.values())
        dense = parameters(anatomy)
        saved = [[dense - parameters(anatomy, choice) for choice in menu] for menu in parts]
        step = min(after - before for menu in saved for before, after in pairwise(menu))
        search = Allocation(
            parts, saved, self.ratio * dense, step, lambda picked: self._settled(anatomy, menus, picked)
        )
        search.run(lambda subnet: [score(subnet)])
        if search.picked is None:
            raise RatioError(
                f"ratio {self.ratio} cannot be reached: the loss is not finite without some blocks, and the others do "
                "not suffice; give a smaller ratio"
            )
        start = self._settled(anatomy, menus, search.picked)
        picks = {start: search.picked}
        unit = (unit_of(by_parameters(anatomy), self._moves(anatomy), anatomy) - 0.5) / dense  # less than a whole unit

        def trade(now: Subnet, draw: random.Random) -> Subnet | None:
            down, up = draw.sample(range(len(parts)), 2)
            picked = list(picks[now])
            picked[down], picked[up] = picked[down] + 1, picked[up] - 1
            if picked[down] >= len(parts[down]) or picked[up] < 0:
                return None
            if ratio(anatomy, _mixed(menus, picked)) < self.ratio:
                return None
            subnet = self._settled(anatomy, menus, picked)
            if ratio(anatomy, subnet) > max(ratio(anatomy, now), self.ratio + unit):
                return None
            picks.setdefault(subnet, picked)
            return subnet

        climb = HillClimb(Space(), [start], self.swaps if len(parts) > 1 else 0, self.seed, propose=trade)
        climb.run(lambda subnet: [score(subnet)])
        return climb.subnet, climb.seen[climb.subnet][0]

    def _settled(self, anatomy: Anatomy, menus: Menus, picked: Sequence[int]) -> Subnet:
        """The sub-network of the picked choices, adjusted to less than one group above the ratio."""
        axes = {axis.name: axis for name in menus for axis in anatomy.blocks[name].leaders} if self.levels else {}
        steps = {name: [axis.size, *widths(axis, self.group)] for name, axis in axes.items()}
        return settled(by_parameters(anatomy), anatomy, _mixed(menus, picked), self.ratio, steps, menus)

    def _moves(self, anatomy: Anatomy) -> Moves:
        """One group less of each axis; whole blocks if no widths are scored."""
        return step_moves(anatomy.axes.values(), self.group) if self.levels else block_moves(anatomy)


def _mixed(menus: Menus, picked: Sequence[int]) -> Subnet:
    """The sub-network with one choice of each menu made."""
    chosen = [menu[index] for menu, index in zip(menus.values(), picked, strict=True)]
    keep = {axis: units for choice in chosen for axis, units in choice.keep}
    return Subnet(frozenset().union(*(choice.skip for choice in chosen)), tuple(sorted(keep.items())))


def _narrower(axes: Sequence[Axis], share: float, group: int) -> Subnet:
    """The sub-network without about ``share`` of every axis, as far as its units allow."""
    allowed = {axis: widths(axis, group) for axis in axes}
    return narrowed(
        (axis.name, min(sizes, key=lambda units: abs(axis.size * (1 - share) - units)))
        for axis, sizes in allowed.items()
        if sizes
    )
