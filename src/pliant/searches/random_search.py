"""Random search: the control that every other search has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pliant.searches.search import Candidates, SpaceSearch

DRAWS = 100  # draws without a new sub-network, after which a space is assumed to hold no more


@dataclass
class RandomSearch(SpaceSearch):
    """Draw ``budget`` different sub-networks from a space; fewer where it does not have as many within the limits.

    Without limits every choice is drawn at random; with limits, random choices are shrunk until all limits hold.
    """

    def candidates(self) -> Candidates:
        draw, misses = random.Random(self.seed), 0
        while len(self.seen) < self.budget and misses < DRAWS:
            limited = self.limits.at_most
            candidate = self.space.shrunk(self.limits.allow, draw) if limited else self.space.sample(draw)
            if candidate not in self.seen and self.limits.allow(candidate):
                misses = 0
                yield [candidate]
            else:
                misses += 1
