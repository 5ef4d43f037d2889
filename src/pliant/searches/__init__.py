"""Ways to look for a sub-network, and the archive of everything that they evaluated."""

from pliant.searches.archive import Archive, ArchiveError
from pliant.searches.greedy import MODES, Greedy, Move

__all__ = ["MODES", "Archive", "ArchiveError", "Greedy", "Move"]
