"""Search: which sub-network to evaluate next, by ask and tell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from pliant.elastic import Subnet

Look = Generator[Sequence[Subnet], None, None]
"""A search as a generator: it yields candidates and resumes once all of them are in :attr:`Search.seen`."""


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

    A subclass writes its algorithm as a generator, :meth:`look`. The same values always lead to the same candidates, so a search
    is resumed by running it again: the archive holds earlier evaluations.

    Attributes:
        seen: the values of every evaluated candidate, in order.
    """

    seen: dict[Subnet, tuple[float, ...]] = field(init=False, default_factory=dict)

    @abstractmethod
    def look(self) -> Look:
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
        if not hasattr(self, "_looking"):
            self._looking, self._open = self.look(), list[Subnet]()
        while not self._open and self._looking is not None:
            try:
                self._open = list(dict.fromkeys(next(self._looking)))
            except StopIteration:
                self._looking = None
