"""Hill climbing: try a change, keep it when the loss falls."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pliant.elastic import Subnet
from pliant.searches.search import Limits, Look, Search


@dataclass
class HillClimb(Search):
    """Go from ``start`` to a neighbour whenever its first value is less. It never ends worse than it began.

    Arguments:
        start: the first candidate.
        propose: makes a neighbour of a sub-network, such as :meth:`pliant.searches.space.Space.neighbour`; None if there is none.
        tries: number of proposals.
        seed: of the random proposals.
        limits: neighbours that exceed them are not evaluated.

    Attributes:
        subnet: the best sub-network so far.
    """

    start: Subnet
    propose: Callable[[Subnet, random.Random], Subnet | None]
    tries: int
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.subnet = self.start

    def look(self) -> Look:
        draw = random.Random(self.seed)
        yield [self.start]
        for _ in range(self.tries):
            candidate = self.propose(self.subnet, draw)
            if candidate is None or not self.limits.allow(candidate):
                continue
            yield [candidate]
            value, now = self.seen[candidate][0], self.seen[self.subnet][0]
            if value < now or (math.isnan(now) and math.isfinite(value)):
                self.subnet = candidate
