"""MultiPruner: remove blocks, then MLP channels, then attention heads, each up to its share of the ratio.

Muñoz et al., "MultiPruner: Balanced Structure Removal in Foundation Models", 2025 (arXiv 2501.09949).
"""

from __future__ import annotations

from pliant.elastic import Subnet
from pliant.errors import StepError
from pliant.prune import Pruner, WidthPruner, block_moves, pooled, width_moves
from pliant.prune.ratio_target import Goal
from pliant.prune.unit_order import ordered
from pliant.step import Job
from pliant.step_setting import setting


class MultiPruner(WidthPruner, Pruner):
    """Three greedy stages from coarse to fine. Units are sorted by importance first, so that a stage always removes the
    least important remaining ones."""

    split: str = setting(
        "How the ratio is shared among blocks, MLP channels and attention heads (paper, table 7).", default="44:52:4"
    )

    width_samples: int = setting("Rows of calibration text for the two width stages.", default=128, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares()

    def shares(self) -> tuple[float, float, float]:
        """The split as three shares that sum to 1.

        Raises:
            StepError: it is not three finite numbers, of which none is negative and one is above 0.
        """
        try:
            blocks, channels, heads = (float(part) for part in self.split.split(":"))
        except (AttributeError, ValueError):
            raise StepError(f"split must be blocks:channels:heads, such as 44:52:4; not {self.split!r}") from None
        total = blocks + channels + heads
        if min(blocks, channels, heads) < 0 or not 0 < total < float("inf"):
            raise StepError(
                f"split needs finite shares, none below 0 and not all 0, such as 44:52:4; not {self.split!r}"
            )
        return blocks / total, channels / total, heads / total

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        blocks, channels, heads = self.shares()
        stages = [
            ("blocks", blocks, block_moves(anatomy)),
            ("mlp channels", channels, width_moves(anatomy, self.mlp_groups(job, anatomy))),
            ("attention heads", heads, width_moves(anatomy, self.head_groups(job, anatomy))),
        ]
        # some layouts have no moves of a kind; the others then take its share
        possible = [(name, share, moves) for name, share, moves in stages if share > 0 and moves(Subnet())]
        total = sum(share for _, share, _ in possible)
        planned = [(name, share / total, moves) for name, share, moves in possible]
        pruning.check_reach([moves for _, _, moves in planned], self.ratio)
        # the paper draws the sample for the widths first
        for_widths = self.windows(job, self.width_samples, self.seed)
        for_blocks = self.windows(job, self.samples, self.seed + 1)
        with ordered(job, anatomy, self.order, for_widths):
            ratio = 0.0
            all_kinds = pooled(*(moves for _, _, moves in planned))
            for name, share, moves in planned:
                ratio += self.ratio * share
                last = name == planned[-1][0]
                windows = for_blocks if name == "blocks" else for_widths
                units = moves if last else all_kinds  # so that an early stage does not overshoot the ratio
                goal = Goal(pruning.budget, self.ratio if last else ratio)
                self.remove(pruning, name, moves, windows, goal, units, self.ratio)
            if not pruning.budget.reached(pruning.subnet, self.ratio):  # the last stage ran out of moves
                self.remove(pruning, "all kinds", all_kinds, for_widths, self.goal(pruning))
            self.finish(pruning, job, planned[-1][2], for_blocks if planned[-1][0] == "blocks" else for_widths)
