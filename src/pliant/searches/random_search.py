"""Random search: the control that every other search has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pliant.searches.search import Limits, Look, Search
from pliant.searches.space import Space

DRAWS = 100  # draws per candidate, after which a space is assumed to hold no more


@dataclass
class RandomSearch(Search):
    """Draw different sub-networks from a space.

    Arguments:
        tries: number of sub-networks; fewer if the space does not hold as many within the limits.
    """

    space: Space
    tries: int
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def look(self) -> Look:
        draw = random.Random(self.seed)
        for _ in range(DRAWS * self.tries):
            if len(self.seen) == self.tries:
                return
            candidate = self.space.sample(draw)
            if candidate not in self.seen and self.limits.allow(candidate):
                yield [candidate]
