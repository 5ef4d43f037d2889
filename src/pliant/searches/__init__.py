"""Ways to look for a sub-network, and the archive of everything that they evaluated."""

from pliant.searches.archive import Archive, ArchiveError
from pliant.searches.greedy import MODES, Greedy, Move
from pliant.searches.search import Limits, Search

__all__ = ["MODES", "Archive", "ArchiveError", "Greedy", "Limits", "Move", "Search"]
