"""One greedy search over blocks, channel groups and attention groups together, weighed by what each saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pliant.search.moves import block_moves, head_axes, pooled, width_moves
from pliant.search.order import check_order, ordered
from pliant.search.pruner import GreedyPruner
from pliant.step import Job


@dataclass(frozen=True, kw_only=True)
class UnifiedPruner(GreedyPruner):
    """MultiPruner without stages and without a split to tune: at every step the unit goes that hurts least for what it
    saves, whatever its kind."""

    kind: ClassVar[str] = "unified"

    per: str = "parameters"
    """Remove what hurts least per: unit (whatever its size), parameters, macs, bytes (that decoding reads), or prefill or
    decode (milliseconds, measured on this machine first)."""

    mlp_group: int | None = None
    """MLP channels removed in one move; a quarter of the hidden size when left out."""

    head_group: int = 1
    """Key-value groups removed in one move, each with all query heads that share it."""

    order: str = "activation"
    """Which channels and heads go first: l1 (those with the smallest weights), activation (those that contribute least on
    calibration text), or stored (the last ones)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(mlp_group=1, head_group=1)
        check_order(self.order)

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        group = self.mlp_group or max(1, job.model.config.get_text_config(decoder=True).hidden_size // 4)
        groups = {"channels": group, "experts": 1, **dict.fromkeys(head_axes(anatomy), self.head_group)}
        moves = pooled(block_moves(anatomy), width_moves(anatomy, groups))
        self.check_reach(anatomy, [moves])
        windows = self.windows(job, self.samples, self.seed)
        with ordered(job.model, anatomy, self.order, windows):
            self.stage(pruning, "blocks, channels and heads", moves, windows, self.ratio)
            self.finish(pruning, job)
