"""One greedy search over blocks, channel groups and attention groups together, weighted by what each saves."""

from __future__ import annotations

from pliant.prune.moves import block_moves, pooled, width_moves
from pliant.prune.settings import Pruner, WidthPruner
from pliant.prune.unit_order import ordered
from pliant.step import Job


class UnifiedPruner(WidthPruner, Pruner):
    """MultiPruner without stages and without a split to tune: every step removes the unit with the smallest loss
    increase for what it saves, whatever its kind."""

    per: str = "parameters"
    order: str = "activation"

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        groups = {**self.mlp_groups(job, anatomy), **self.head_groups(job, anatomy)}
        moves = pooled(block_moves(anatomy), width_moves(anatomy, groups))
        pruning.check_reach([moves], self.ratio)
        windows = self.windows(job, self.samples, self.seed)
        with ordered(job, anatomy, self.order, windows):
            self.remove(pruning, "blocks, channels and heads", moves, windows, self.goal(pruning))
            self.finish(pruning, job, moves, windows)
