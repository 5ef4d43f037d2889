"""Search: which sub-network to evaluate next, by ask and tell."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pliant.elastic import Subnet
from pliant.errors import StepError
from pliant.registry import SEARCHES, find
from pliant.searches.space import Space

Candidates = Generator[Sequence[Subnet], None, None]
"""A search as a generator: it yields candidates and resumes once all of them are in :attr:`Search.seen`."""


ENDLESS = 100  # times the budget: a search over a space that asks for more candidates does not end
EMPTY = 10_000  # times in a row that a search may yield no candidate


@dataclass(frozen=True)
class Limits:
    """Hard limits on costs. A search never asks for a candidate that exceeds one of them.

    Attributes:
        at_most: (cost, maximum) pairs.
    """

    at_most: tuple[tuple[Callable[[Subnet], float], float], ...] = ()

    def excess(self, candidate: Subnet) -> float:
        """The sum of the shares by which a candidate exceeds its limits; 0 if it is allowed."""
        return sum(max(0.0, cost(candidate) - most) / max(abs(most), 1e-12) for cost, most in self.at_most)

    def allow(self, candidate: Subnet) -> bool:
        """Whether no limit is exceeded."""
        return all(cost(candidate) <= most for cost, most in self.at_most)


@dataclass
class Search(ABC):
    """A search for sub-networks with small values.

    A subclass writes its algorithm as a generator, :meth:`candidates`. The same values always lead to the same
    candidates, so a search is resumed by running it again: the archive holds earlier evaluations.

    Attributes:
        seen: the values of every evaluated candidate, in order.
    """

    seen: dict[Subnet, tuple[float, ...]] = field(init=False, default_factory=dict)

    @abstractmethod
    def candidates(self) -> Candidates:
        """Yield the next candidates; when the generator resumes, their values are in :attr:`seen`."""

    def ask(self) -> list[Subnet]:
        """The candidates to evaluate next; empty when the search is done."""
        self._advance()
        return list(self._open)

    def tell(self, candidate: Subnet, values: Sequence[float]) -> None:
        """Report the values of a candidate from :meth:`ask`, one per objective; lower is better.

        Raises:
            WeightError: the search cannot continue with these values.
        """
        self.seen[candidate] = tuple(values)
        self._open = [other for other in self._open if other != candidate]
        self._advance()

    @property
    def done(self) -> bool:
        """Whether there are no more candidates."""
        self._advance()
        return not self._open

    def run(self, evaluate: Callable[[Subnet], Sequence[float]]) -> None:
        """Ask and tell until done."""
        while not self.done:
            for candidate in self.ask():
                self.tell(candidate, evaluate(candidate))

    def best(self, objective: int = 0) -> Subnet:
        """The candidate with the least value of one objective; the earliest of equal ones."""
        return min(self.seen, key=lambda candidate: self.seen[candidate][objective])

    def _advance(self) -> None:
        """Get the next candidates from the algorithm once all previous ones are evaluated."""
        if not hasattr(self, "_generator"):
            self._generator, self._open = self.candidates(), list[Subnet]()
        empty = 0
        while not self._open and self._generator is not None:
            try:
                self._open = list(dict.fromkeys(next(self._generator)))
            except StopIteration:
                self._generator = None
            if (empty := empty + 1) > EMPTY:
                raise StepError(f"the search {type(self).__name__} yields no candidates and does not end")


@dataclass
class SpaceSearch(Search):
    """A search over a space. A step takes it by its name and constructs each of them with the same arguments.

    Arguments:
        space: what to choose from.
        first: sub-networks to begin with, one or more.
        budget: how many sub-networks to try.
        seed: of every draw.
        limits: what a candidate must not exceed.
    """

    multi_objective: ClassVar[bool] = False
    """Whether it looks for a front of several values. If not, it makes the first value small, and the others are
    limits."""

    space: Space
    first: Sequence[Subnet]
    budget: int
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    @property
    def start(self) -> Subnet:
        """The first of ``first`` within the limits; the first of all if there is none."""
        return next((one for one in self.first if self.limits.allow(one)), self.first[0])

    def run(self, evaluate: Callable[[Subnet], Sequence[float]]) -> None:
        """Ask and tell until done.

        Raises:
            StepError: it does not end.
        """
        asked = 0
        while not self.done:
            for candidate in self.ask():
                if (asked := asked + 1) > ENDLESS * (self.budget + 1):
                    raise StepError(
                        f"the search {type(self).__name__} does not end: it asked for {asked} sub-networks with a "
                        f"budget of {self.budget}. Its method candidates must return"
                    )
                self.tell(candidate, evaluate(candidate))

    @classmethod
    def check(cls) -> None:
        """Refuse, before any work, to search without a package that is not installed."""


def search_of(name: str) -> type[SpaceSearch]:
    """A search over a space by its name in the registry, or by ``module:Class``.

    Raises:
        StepError: the name is not known, or the class has no algorithm.
        MissingExtraError: a package that the search needs is not installed.
    """
    found = find(SEARCHES, name, "search", base=SpaceSearch)
    if inspect.isabstract(found):
        raise StepError(f"the search {name!r} has no method candidates; write its algorithm there")
    found.check()
    return found
