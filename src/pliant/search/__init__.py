"""How to look for a sub-network."""

from pliant.search.archive import Archive, ArchiveError
from pliant.search.cut import Cut
from pliant.search.greedy import MODES, Greedy, Move
from pliant.search.prune import Pruning, block_moves, reach, width_moves

__all__ = [
    "MODES",
    "Archive",
    "ArchiveError",
    "Cut",
    "Greedy",
    "Move",
    "Pruning",
    "block_moves",
    "reach",
    "width_moves",
]
