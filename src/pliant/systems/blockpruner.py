"""BlockPruner: remove whole attention and MLP blocks, the least important first.

Zhong et al., "BlockPruner: Fine-grained Pruning for Large Language Models", 2024 (arXiv 2406.10594).
"""

from __future__ import annotations

from pliant.prune import GreedyPruner, Pruner, block_moves
from pliant.step import Job
from pliant.step_setting import setting


class BlockPruner(GreedyPruner, Pruner):
    """Algorithm 1 of the paper: mask each remaining block in turn, remove the one with the lowest perplexity,
    repeat."""

    blocks: str = setting(
        "Blocks to remove: attention, mlp, or mix for all.", default="mix", choices=("mix", "attention", "mlp")
    )

    def run(self, job: Job) -> None:
        roles = {"mix": None, "attention": {"attention"}, "mlp": {"mlp", "experts"}}[self.blocks]
        pruning = self.begin(job)
        moves = block_moves(pruning.anatomy, roles)
        pruning.check_reach([moves], self.ratio)
        windows = self.windows(job, self.samples, self.seed)
        self.remove(pruning, "blocks", moves, windows, self.goal(pruning))
        self.finish(pruning, job, moves, windows)
