"""One-shot pruning: rank the blocks once and remove the lowest. These are baselines for every search."""

from __future__ import annotations

import math
import random

import torch

from pliant.criteria.block_ranking import RANKINGS
from pliant.elastic import Subnet
from pliant.errors import StepError
from pliant.prune.moves import block_moves, fitting, layer_moves
from pliant.prune.session import Pruning, Scorer
from pliant.prune.settings import Pruner
from pliant.searches.greedy import check_loss
from pliant.step import Job
from pliant.step_setting import setting

PERPLEXITY, RANDOM = "perplexity", "random"
GRANULARITIES = ("block", "layer")


class OneShot(Pruner):
    """Rank every block (or layer) once on the dense model and remove the lowest until the ratio is met.

    ``by="influence", granularity="layer"`` is ShortGPT.
    """

    by: str = setting(
        "Rank blocks by influence (ShortGPT's Block Influence), magnitude (of their output relative to the residual"
        " stream), perplexity (of the model without the block), or random.",
        default="influence",
        choices=(*RANKINGS, PERPLEXITY, RANDOM),
    )

    granularity: str = setting(
        "Remove a block at a time (attention or MLP), or a layer (by the sum of its blocks' ranks).",
        default="block",
        choices=GRANULARITIES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.key != PERPLEXITY and self.by != PERPLEXITY:
            raise StepError(
                f"metric {self.score.name!r} needs by='perplexity': ranking by {self.by} evaluates no score"
            )

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        moves = block_moves(anatomy) if self.granularity == "block" else layer_moves(anatomy)
        pruning.check_reach([moves], self.ratio)
        ranks = self._ranks(pruning, job, self.windows(job, self.samples, self.seed))
        job.record["ranks"] = {name: rank if math.isfinite(rank) else None for name, rank in ranks.items()}
        fit = fitting(pruning.budget, moves, self.ratio)
        while not pruning.budget.reached(pruning.subnet, self.ratio):
            offered = fit(pruning.subnet)
            if not offered:
                break
            ranked = [(sum(ranks[b] for b in move.subnet.skip - pruning.subnet.skip), move) for move in offered]
            rank, lowest = min(ranked, key=lambda pair: pair[0])
            pruning.commit("blocks", lowest, None, rank)
        self.finish(pruning, job, moves)

    def _ranks(self, pruning: Pruning, job: Job, windows: torch.Tensor) -> dict[str, float]:
        blocks = pruning.anatomy.blocks
        if self.by == RANDOM:
            generator = random.Random(self.seed)
            return {name: generator.random() for name in blocks}
        if self.by == PERPLEXITY:
            free = block_moves(pruning.anatomy)(Subnet())

            def show(scorer: Scorer) -> None:
                job.progress.step(scorer.seen / (len(free) + 1), f"{scorer.seen} of {len(free) + 1} scored")

            with pruning.scoring(f"ranking by {self.score.name}", windows, on_score=show) as score:
                check_loss(dense := score(Subnet()))
                ranks = {move.unit: score(move.subnet) - dense for move in free}
        else:
            with job.progress.stage(f"ranking by {self.by}"):
                ranks = RANKINGS[self.by](job.model, pruning.anatomy, windows)
            check_loss(sum(ranks.values()))
        return {name: rank if math.isfinite(rank := ranks.get(name, math.inf)) else math.inf for name in blocks}
