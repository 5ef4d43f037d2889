"""MultiPruner-Evol: remove blocks up to half the ratio, then evolve all widths together.

Muñoz et al., "MultiPruner: Balanced Structure Removal in Foundation Models", 2025 (arXiv 2501.09949), the evolutionary
variant. The paper gives no population and no number of generations; the defaults here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from pliant.anatomy import Anatomy, Axis
from pliant.elastic import Subnet, ratio
from pliant.errors import MissingExtraError, RatioError
from pliant.prune import WidthPruner, block_moves, pooled, width_moves
from pliant.prune.moves import settled
from pliant.prune.session import Pruning, Scorer
from pliant.prune.unit_order import ordered
from pliant.searches.greedy import Move
from pliant.step import Job, setting


class MultiPrunerEvol(WidthPruner):
    """BlockPruner up to half the ratio, then NSGA-II over the widths of all MLPs and attentions that are left: the loss
    against the ratio. Of all that was evaluated at the ratio, the one with the lowest loss is taken."""

    kind: ClassVar[str] = "multipruner_evol"

    width_samples: int = setting("Rows of calibration text for the widths.", default=128, at_least=1)

    population: int = setting("Sub-networks in a generation.", default=24, at_least=4)

    generations: int = setting("Generations, the first random one included.", default=10, at_least=1)

    tolerance: float = setting(
        "Consider sub-networks up to this far above the ratio; the excess is restored, down to less than one unit.",
        default=0.005,
        at_least=0,
    )

    def run(self, job: Job) -> None:
        _pymoo()
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        groups = {**self.mlp_groups(job), **self.head_groups(anatomy)}
        self.check_reach(anatomy, [block_moves(anatomy), width_moves(anatomy, groups)])
        for_widths = self.windows(job, self.width_samples, self.seed)
        for_blocks = self.windows(job, self.samples, self.seed + 1)
        with ordered(job, anatomy, self.order, for_widths):
            units = pooled(block_moves(anatomy), width_moves(anatomy, groups))
            self.stage(pruning, "blocks", block_moves(anatomy), for_blocks, self.ratio / 2, units)
            with pruning.scoring("widths", for_widths) as score:
                subnet = self._evolve(pruning, score, groups)
                loss = score(subnet)
            pruning.commit("widths", Move("all", subnet), loss)
            self.finish(pruning, job, units, for_widths)

    def _evolve(self, pruning: Pruning, score: Scorer, groups: dict[str, int]) -> Subnet:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.optimize import minimize

        base, anatomy = pruning.subnet, pruning.anatomy
        axes = [
            (axis, groups[axis.leader])
            for block in anatomy.blocks.values()
            for axis in block.leaders
            if block.name not in base.skip and axis.leader in groups
        ]
        steps = [_steps(axis, group) for axis, group in axes]
        total = self.population * self.generations
        met: dict[Subnet, float] = {}

        class Widths(ElementwiseProblem):
            def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
                subnet = base
                for (axis, _group), allowed, place in zip(axes, steps, x, strict=True):
                    if allowed[int(place)] != axis.size:
                        subnet = subnet.keeping(axis.name, allowed[int(place)])
                loss = score(subnet)
                met[subnet] = loss
                pruning.job.progress.step(len(met) / total, f"{len(met)} of {total} sub-networks, loss {loss:.4f}")
                out["F"] = [loss if np.isfinite(loss) else 1e9, -ratio(anatomy, subnet)]

        problem = Widths(
            n_var=len(axes), n_obj=2, xl=0, xu=np.array([len(allowed) - 1 for allowed in steps]), vtype=int
        )
        first: Any = self._first(base, anatomy, axes, steps)  # pymoo takes an array, its signature does not say so
        algorithm = NSGA2(
            pop_size=self.population,
            sampling=first,
            crossover=SBX(prob=0.9, eta=10, repair=RoundingRepair()),
            mutation=PM(prob=1.0, prob_var=1 / len(axes), eta=3, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        minimize(problem, algorithm, ("n_gen", self.generations), seed=self.seed, verbose=False)
        narrower = width_moves(anatomy, groups)(base)
        unit = min((ratio(anatomy, move.subnet) for move in narrower), default=0.0) - ratio(anatomy, base)
        near = {
            subnet: loss
            for subnet, loss in met.items()
            if np.isfinite(loss) and 0 <= ratio(anatomy, subnet) - self.ratio < max(self.tolerance, unit)
        }
        if not near:
            reached = sorted(ratio(anatomy, subnet) for subnet in met)
            raise RatioError(
                f"none of {len(met)} sub-networks came to ratio {self.ratio} within {self.tolerance} (they span {reached[0]:.3f} "
                f"to {reached[-1]:.3f}); give more generations or a larger tolerance"
            )
        allowed = {axis.name: kept for (axis, _), kept in zip(axes, steps, strict=True)}
        return settled(anatomy, min(near, key=near.__getitem__), self.ratio, allowed)

    def _first(
        self, base: Subnet, anatomy: Anatomy, axes: Sequence[tuple[Axis, int]], steps: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """The first generation: random steps of random axes taken until about the ratio is met."""
        draw = np.random.default_rng(self.seed)
        rows = []
        for _ in range(self.population):
            places, subnet = np.zeros(len(axes), dtype=int), base
            until = self.ratio * draw.uniform(0.8, 1.2)
            while ratio(anatomy, subnet) < until and (
                free := [i for i, p in enumerate(places) if p + 1 < len(steps[i])]
            ):
                chosen = int(draw.choice(free))
                places[chosen] += 1
                subnet = subnet.keeping(axes[chosen][0].name, steps[chosen][places[chosen]])
            rows.append(places)
        return np.array(rows)


def _pymoo() -> None:
    try:
        import pymoo  # noqa: F401 - only to know it is there before anything is scored
    except ImportError:
        raise MissingExtraError("the evolutionary search needs pymoo: pip install 'pliant[search]'") from None


def _steps(axis: Axis, group: int) -> list[int]:
    """The numbers of units that can be kept, from all of them down."""
    allowed = [axis.size]
    while (left := axis.less(allowed[-1], group)) is not None:
        allowed.append(left)
    return allowed
