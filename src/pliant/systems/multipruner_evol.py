"""MultiPruner-Evol: remove blocks until half the ratio, then evolve all widths together.

Muñoz et al., "MultiPruner: Balanced Structure Removal in Foundation Models", 2025 (arXiv 2501.09949), the evolutionary
variant. The paper gives no population and no number of generations; the defaults here are ours.
"""

from __future__ import annotations

import numpy as np

from pliant.elastic import Subnet
from pliant.errors import RatioError
from pliant.prune import Pruner, WidthPruner, block_moves, pooled, width_moves
from pliant.prune.moves import settled
from pliant.prune.ratio_target import Budget, Goal
from pliant.prune.session import Pruning, Scorer
from pliant.prune.unit_order import ordered
from pliant.registry import SEARCHES
from pliant.searches import Limits, Move, Space, SpaceSearch, search_of
from pliant.step import Job
from pliant.step_setting import setting


class MultiPrunerEvol(WidthPruner, Pruner):
    """BlockPruner until half the ratio, then NSGA-II over the widths of all remaining MLPs and attentions: the loss
    against the ratio. Of all evaluated sub-networks at the ratio, the one with the lowest loss is taken."""

    width_samples: int = setting("Rows of calibration text for the widths.", default=128, at_least=1)

    width_search: str = setting(
        "How widths are searched: nsga2 evolves a front of loss and ratio; hill and random make the loss small at "
        "the ratio; or your own as module:Class.",
        default="nsga2",
        names=SEARCHES,
    )

    population: int = setting("Sub-networks in a generation, and drawn to begin with.", default=24, at_least=4)

    generations: int = setting(
        "Generations, the first random one included; other searches try as many sub-networks.", default=10, at_least=1
    )

    tolerance: float = setting(
        "Consider sub-networks up to this far above the ratio; the excess is restored, down to less than one unit.",
        default=0.005,
        at_least=0,
    )

    def run(self, job: Job) -> None:
        kind = search_of(self.width_search)
        pruning = self.begin(job)
        anatomy, budget = pruning.anatomy, pruning.budget
        groups = {**self.mlp_groups(job, anatomy), **self.head_groups(job, anatomy)}
        pruning.check_reach([block_moves(anatomy), width_moves(anatomy, groups)], self.ratio)
        for_widths = self.windows(job, self.width_samples, self.seed)
        for_blocks = self.windows(job, self.samples, self.seed + 1)
        total = self.population * self.generations

        def show(scorer: Scorer) -> None:
            job.progress.step(min(1.0, scorer.seen / total), f"{scorer.seen} of {total} sub-networks scored")

        with ordered(job, anatomy, self.order, for_widths):
            units = pooled(block_moves(anatomy), width_moves(anatomy, groups))
            half = Goal(budget, self.ratio / 2)
            self.remove(pruning, "blocks", block_moves(anatomy), for_blocks, half, units, self.ratio)
            space = Space.of(anatomy, groups, base=pruning.subnet)
            at_ratio = (lambda subnet: -budget.ratio(subnet), -self.ratio)
            limits = Limits(() if kind.multi_objective else (at_ratio,))
            with pruning.scoring("widths", for_widths, on_score=show) as score:
                search = kind(space, self._first(budget, space), total, self.seed, limits)
                search.run(lambda subnet: [score(subnet), -budget.ratio(subnet)])
                subnet = settled(budget, anatomy, self._nearest(pruning, search, groups), self.ratio, dict(space.axes))
                loss = score(subnet)
            pruning.commit("widths", Move("all", subnet), loss)
            self.finish(pruning, job, units, for_widths)

    def _first(self, budget: Budget, space: Space) -> list[Subnet]:
        """The first generation: random axes narrowed by random steps until about the ratio is reached."""
        draw = np.random.default_rng(self.seed)
        ratios = (self.ratio * draw.uniform(0.8, 1.2) for _ in range(self.population))  # drawn lazily, one per shrink
        return [space.shrunk(lambda subnet, least=least: budget.ratio(subnet) >= least, draw) for least in ratios]

    def _nearest(self, pruning: Pruning, search: SpaceSearch, groups: dict[str, int]) -> Subnet:
        """The sub-network with the lowest loss of those at the ratio."""
        base, ratio = search.space.base, pruning.budget.ratio
        narrower = width_moves(pruning.anatomy, groups)(base)
        unit = min((ratio(move.subnet) for move in narrower), default=0.0) - ratio(base)
        ratios = {subnet: ratio(subnet) for subnet in search.seen}
        near = [
            subnet
            for subnet, (loss, _) in search.seen.items()
            if np.isfinite(loss) and 0 <= ratios[subnet] - self.ratio < max(self.tolerance, unit)
        ]
        if not ratios:
            raise RatioError(
                f"the search {self.width_search} asked for no sub-network; change its settings or the ratio"
            )
        if not near:
            raise RatioError(
                f"none of {len(ratios)} sub-networks is within {self.tolerance} above ratio {self.ratio} (their "
                f"ratios are {min(ratios.values(), default=0):.3f} to {max(ratios.values(), default=0):.3f}); give "
                "more generations or a larger tolerance"
            )
        return min(near, key=lambda subnet: search.seen[subnet][0])
