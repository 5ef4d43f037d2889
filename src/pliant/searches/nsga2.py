"""NSGA-II over a space, by pymoo.

Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pliant.elastic import Subnet
from pliant.errors import MissingExtraError
from pliant.searches.search import Candidates, SpaceSearch

WORST = 1e9  # replaces values that are not finite, and all values of a candidate that exceeds a limit


@dataclass
class NSGA2(SpaceSearch):
    """Evolve sub-networks towards small values of several objectives.

    Arguments:
        first: sub-networks of the first generation. All others are as large.
        objectives: number of values per candidate.
    """

    multi_objective: ClassVar[bool] = True

    objectives: int = 2

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def check(cls) -> None:
        """Raises:
        MissingExtraError: pymoo is not installed.
        """
        try:
            import pymoo  # noqa: F401 - only to know that it is there before anything is scored
        except ImportError:
            raise MissingExtraError("the evolutionary search needs pymoo: pip install 'pliant[search]'") from None

    def candidates(self) -> Candidates:
        from pymoo.algorithms.moo.nsga2 import NSGA2 as Algorithm  # noqa: N811 - this file has its own
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.problems.static import StaticProblem

        counts = np.array(self.space.counts)
        problem = Problem(n_var=len(counts), n_obj=self.objectives, n_ieq_constr=1, xl=0, xu=counts - 1, vtype=int)
        first: Any = np.array([self.space.encode(subnet) for subnet in self.first])  # pymoo's signature lacks arrays
        algorithm = Algorithm(
            pop_size=len(self.first),
            sampling=first,
            crossover=SBX(prob=0.9, eta=10, repair=RoundingRepair()),
            mutation=PM(prob=1.0, prob_var=1 / len(counts), eta=3, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        algorithm.setup(problem, termination=("n_gen", self.budget // len(self.first)), seed=self.seed, verbose=False)
        while algorithm.has_next():
            infills: Any = algorithm.ask()
            candidates = [self.space.decode(choices) for choices in infills.get("X").astype(int)]
            excess = [self._excess(candidate) for candidate in candidates]
            yield [candidate for candidate, over in zip(candidates, excess, strict=True) if not over]
            worst = (WORST,) * self.objectives
            values = np.array([self.seen.get(candidate, worst) for candidate in candidates], dtype=float)
            values[~np.isfinite(values)] = WORST
            evaluated = StaticProblem(problem, F=values, G=np.array(excess, dtype=float)[:, None])
            algorithm.evaluator.eval(evaluated, infills)
            algorithm.tell(infills=infills)

    def _excess(self, candidate: Subnet) -> float:
        return self.limits.excess(candidate) + (not self.space.allows(candidate))
