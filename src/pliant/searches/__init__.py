"""Search algorithms over sub-networks, and the archive of everything they evaluate."""

from pliant.searches.allocation import Allocation
from pliant.searches.archive import Archive, ArchiveError
from pliant.searches.greedy import MODES, Greedy, Move
from pliant.searches.hill import HillClimb
from pliant.searches.nsga2 import NSGA2
from pliant.searches.random_search import RandomSearch
from pliant.searches.search import Limits, Search, SpaceSearch, search_of
from pliant.searches.space import Space

__all__ = [
    "MODES",
    "NSGA2",
    "Allocation",
    "Archive",
    "ArchiveError",
    "Greedy",
    "HillClimb",
    "Limits",
    "Move",
    "RandomSearch",
    "Search",
    "Space",
    "SpaceSearch",
    "search_of",
]
