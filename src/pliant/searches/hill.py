"""Hill climbing: try a change, keep it when the loss falls."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from pliant.elastic import Subnet
from pliant.searches.search import Candidates, SpaceSearch


@dataclass
class HillClimb(SpaceSearch):
    """Go from ``start`` to a neighbour whenever its first value is less. It never ends worse than it began.

    Arguments:
        propose: makes a neighbour of a sub-network; None if there is none. Default:
            :meth:`pliant.searches.space.Space.neighbour`.

    Attributes:
        subnet: the best sub-network so far.
    """

    propose: Callable[[Subnet, random.Random], Subnet | None] | None = None

    def __post_init__(self) -> None:
        self.subnet = self.start

    def candidates(self) -> Candidates:
        draw, propose = random.Random(self.seed), self.propose or self.space.neighbour
        yield [self.subnet]
        for _ in range(self.budget):
            candidate = propose(self.subnet, draw)
            if candidate is None or not self.limits.allow(candidate):
                continue
            yield [candidate]
            value, now = self.seen[candidate][0], self.seen[self.subnet][0]
            if value < now or (math.isnan(now) and math.isfinite(value)):
                self.subnet = candidate
