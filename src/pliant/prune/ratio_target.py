"""The ratio that a pruner has to reach, of all parameters or of another cost, and the error if it cannot be reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet, parameters
from pliant.errors import RatioError
from pliant.measure.cost import Cost

TOLERANCE = 1e-12  # ratios are rounded quotients of whole numbers
PARTS = 10**6  # a cost that is not a whole number is counted in millionths of the dense model's


@dataclass(frozen=True)
class Budget:
    """The cost of which a pruner removes a share.

    Attributes:
        size: the cost of a sub-network as a whole number, so that savings add up exactly.
    """

    size: Callable[[Subnet], int]

    @classmethod
    def of(cls, cost: Cost) -> Budget:
        """The budget of a cost by :func:`pliant.measure.cost.cost_of`."""
        dense = cost(Subnet())
        if isinstance(dense, int):
            return cls(lambda subnet: int(cost(subnet)))
        return cls(lambda subnet: round(cost(subnet) / dense * PARTS))

    @cached_property
    def dense(self) -> int:
        """The cost of the dense model."""
        return self.size(Subnet())

    def ratio(self, subnet: Subnet) -> float:
        """Share of the cost that ``subnet`` removes, 0 for the dense model."""
        return 1 - self.size(subnet) / self.dense

    def reached(self, subnet: Subnet, ratio: float) -> bool:
        """Whether ``subnet`` removes at least ``ratio`` of the cost."""
        return self.ratio(subnet) >= ratio - TOLERANCE


@dataclass(frozen=True)
class Goal:
    """Where a stage ends: at a ratio, or after a number of removals."""

    budget: Budget
    ratio: float | None = None
    steps: int | None = None

    def reached(self, subnet: Subnet, made: int) -> bool:
        """Whether the stage ends with ``subnet``, after ``made`` removals."""
        if self.ratio is None:
            return made >= (self.steps or 0)
        return self.budget.reached(subnet, self.ratio)

    def remaining(self, subnet: Subnet, made: int, each: float) -> float:
        """Estimated number of further removals.

        Arguments:
            each: the ratio that a removal gains.
        """
        if self.ratio is None:
            return (self.steps or 0) - made
        return max(0.0, self.ratio - self.budget.ratio(subnet)) / max(each, TOLERANCE)

    def shown(self, subnet: Subnet, made: int) -> str:
        """The state of the search in a few words."""
        if self.ratio is None:
            return f"{made} of {self.steps} removed"
        return f"ratio {self.budget.ratio(subnet):.3f} of {self.ratio:.3f}, {made} removed"


def by_parameters(anatomy: Anatomy) -> Budget:
    """The budget that counts all parameters."""
    return Budget(lambda subnet: parameters(anatomy, subnet))


def out_of_reach(ratio: float, most: float, removal: str, name: str = "ratio") -> RatioError:
    """The error for a ratio that is too large.

    Arguments:
        most: the largest possible ratio.
        removal: what removes that much, as the subject of a clause.
        name: the setting.
    """
    if most < 1e-4:
        return RatioError(f"{name} {ratio} cannot be reached: {removal} removes nothing; choose another pruner")
    # rounded down, so that the printed ratio can be reached
    return RatioError(
        f"{name} {ratio} cannot be reached: {removal} removes {math.floor(most * 1e4) / 1e4:.4f}; give at most that"
    )
