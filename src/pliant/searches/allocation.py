"""Allocation: measure every choice alone, then solve for the best mix of choices as an integer program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pliant.elastic import Subnet
from pliant.searches.greedy import check_loss
from pliant.searches.search import Candidates, Search


@dataclass
class Allocation(Search):
    """Choose one item of every menu so that enough is saved and the loss rises least.

    Loss increases are measured with one choice made at a time and assumed to add up.

    Arguments:
        menus: for every part of a model the sub-networks to choose from; the first of each is the dense model.
        saved: savings of each choice, whole numbers in the layout of ``menus``.
        target: savings to reach.
        slack: how much more may be saved; if no mix is within it, the mix that saves least is taken.
        combined: makes the sub-network of a mix from the index of the choice in each menu; it is the last candidate.

    Attributes:
        increases: loss increase of each choice, in the layout of ``menus``.
        picked: index of the choice in each menu; None if no mix with finite losses saves enough.
    """

    menus: Sequence[Sequence[Subnet]]
    saved: Sequence[Sequence[int]]
    target: float
    slack: float
    combined: Callable[[Sequence[int]], Subnet]
    increases: list[list[float]] = field(init=False, default_factory=list)
    picked: list[int] | None = field(init=False, default=None)

    def candidates(self) -> Candidates:
        """The dense model, then every choice, then the best mix.

        Raises:
            WeightError: the loss of the dense model is not finite.
        """
        yield [Subnet()]
        check_loss(dense := self.seen[Subnet()][0])
        yield [choice for menu in self.menus for choice in menu if choice != Subnet()]
        self.increases = [[self.seen[choice][0] - dense for choice in menu] for menu in self.menus]
        self.picked = allocate(self.saved, self.increases, self.target, self.slack)
        if self.picked is not None:
            yield [self.combined(self.picked)]


def allocate(
    saved: Sequence[Sequence[int]], increases: Sequence[Sequence[float]], target: float, slack: float
) -> list[int] | None:
    """Make one choice of each menu, with the least total cost among mixes that save ``target`` to ``target + slack``.

    A multiple-choice knapsack, solved exactly (scipy's ``milp``).

    Arguments:
        saved: savings of the choices of each menu, whole numbers.
        increases: cost of each choice; one that is not finite is never made.
        slack: if no mix is within it, the mix that saves least is taken.

    Returns:
        The index of the choice in each menu, or None if no mix saves enough.
    """
    sizes, lengths = np.array([n for menu in saved for n in menu], dtype=float), [len(menu) for menu in saved]
    costs = np.array([d for menu in increases for d in menu], dtype=float)
    unit = max(1, math.gcd(*(int(n) for n in sizes)))  # small numbers are solved with small errors
    sizes, least, most = sizes / unit, math.ceil(target / unit), math.floor((target + slack) / unit)
    allowed = np.isfinite(costs)
    costs[~allowed] = 0.0
    mix = _solved(costs, sizes, allowed, lengths, least, most) if most >= least else None
    return mix or _solved(sizes, sizes, allowed, lengths, least, math.inf)


def _solved(
    costs: np.ndarray, sizes: np.ndarray, allowed: np.ndarray, lengths: Sequence[int], least: int, most: float
) -> list[int] | None:
    """The mix with the least total cost and a total size from ``least`` to ``most``."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    starts = np.cumsum([0, *lengths[:-1]])
    upper: Any = allowed.astype(float)  # scipy accepts arrays, though its signature does not say so
    one_of_each = np.zeros((len(lengths), len(sizes)))
    for row, (start, count) in enumerate(zip(starts, lengths, strict=True)):
        one_of_each[row, start : start + count] = 1
    low: Any = float(least)
    high: Any = most
    while low <= high:
        solution = milp(
            costs,
            integrality=np.ones(len(sizes)),
            bounds=Bounds(0, upper),
            constraints=[LinearConstraint(one_of_each, 1, 1), LinearConstraint(sizes[None], low, high)],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            return None
        picked = [int(np.argmax(solution.x[a : a + n])) for a, n in zip(starts, lengths, strict=True)]
        total = sum(sizes[a + index] for a, index in zip(starts, picked, strict=True))
        if least <= total <= most:
            return picked
        # the solver allows small relative errors, which show in large numbers
        low, high = (low + least - total, high) if total < least else (low, high - (total - most))
    return None
