"""Structured pruning: the parts that all pruners share, and the pruners that come from no paper."""

from pliant.prune.known_subnet import Cut
from pliant.prune.moves import axis_moves, block_moves, layer_moves, pooled, reach, scan_moves, width_moves
from pliant.prune.session import Pruning
from pliant.prune.settings import GreedyPruner, Pruner, TextPruner, WidthPruner

__all__ = [
    "Cut",
    "GreedyPruner",
    "Pruner",
    "Pruning",
    "TextPruner",
    "WidthPruner",
    "axis_moves",
    "block_moves",
    "layer_moves",
    "pooled",
    "reach",
    "scan_moves",
    "width_moves",
]
