"""How to look for a sub-network."""

from pliant.search.archive import Archive, ArchiveError
from pliant.search.cut import Cut
from pliant.search.greedy import MODES, Greedy, Move
from pliant.search.moves import block_moves, layer_moves, pooled, reach, width_moves
from pliant.search.pruner import GreedyPruner, Pruner, WidthPruner
from pliant.search.pruning import Pruning

__all__ = [
    "MODES",
    "Archive",
    "ArchiveError",
    "Cut",
    "Greedy",
    "GreedyPruner",
    "Move",
    "Pruner",
    "Pruning",
    "WidthPruner",
    "block_moves",
    "layer_moves",
    "pooled",
    "reach",
    "width_moves",
]
