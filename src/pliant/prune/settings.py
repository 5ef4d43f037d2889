"""Settings that structured pruners share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from pliant.anatomy import Anatomy
from pliant.architecture import ROLES
from pliant.checkpoint.fingerprint import check_finite, fingerprint
from pliant.data import Text
from pliant.elastic import described
from pliant.errors import DataError, MemoryLimitError, RatioError
from pliant.formatting import human_bytes
from pliant.forward.windows import check_model, seqlen_of, windows_for
from pliant.measure.cost import COSTS
from pliant.measure.scores import Score, score_of
from pliant.pages import pages_of
from pliant.prune.moves import Moves, fitting, unit_of
from pliant.prune.ratio_target import Budget, Goal
from pliant.prune.repair import repair_bytes
from pliant.prune.session import ARCHIVE, PER_REMOVAL, Pruning
from pliant.prune.unit_order import STORED
from pliant.prune.width_cuts import step_of
from pliant.record import Note
from pliant.registry import IMPORTANCE, SCORES
from pliant.searches.greedy import MODES
from pliant.step import Job, Step
from pliant.step_setting import setting

UNIT = "unit"


class TextPruner(Step):
    """Settings shared by every pruner that reads calibration text."""

    family: ClassVar[str] = "pruner"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    keeps: ClassVar[tuple[str, ...]] = (ARCHIVE,)

    samples: int = setting("Rows of calibration text to choose blocks on.", default=256, at_least=1)

    seqlen: int | None = setting(
        "Tokens in a calibration window. Default: the smaller of 2048 and the model's positions.",
        default=None,
        at_least=2,
    )

    metric: str | Score = setting(
        "Score that removals should preserve: perplexity, kl (divergence from the dense model's predictions), or "
        "your own as module:Score. In Python also a Score, such as ChoiceAccuracy(questions).",
        default="perplexity",
        names=SCORES,
    )

    seed: int = setting("Seed that calibration rows are drawn with.", default=42, at_least=0, at_most=2**63 - 1)

    repair: int = setting(
        "Rows of calibration text to refit the remaining weights on, so that they reproduce the dense model's residual "
        "stream; 0 leaves weights unchanged.",
        default=0,
        at_least=0,
    )

    ridge: float = setting(
        "Penalty on the change of a refitted weight, as a multiple of the mean square of its inputs; fewer rows need "
        "more.",
        default=1.0,
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        score = score_of(self.metric)
        if isinstance(self.metric, Mapping):  # from a recipe
            object.__setattr__(self, "metric", score)

    @property
    def score(self) -> Score:
        """The score that removals should preserve."""
        return score_of(self.metric)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "metric": self.score.plain()}

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:  # noqa: ARG002
        return self.samples * row * 3, False

    def begin(self, job: Job) -> Pruning:
        """Check the model and the data, and open the archive."""
        if not isinstance(job.data, Text):
            given = "nothing" if job.data is None else f"pliant.{type(job.data).__name__.lower()}"
            raise DataError(f"{self.kind} needs calibration text, not {given}; pass data=pliant.text('some.txt')")
        check_model(job.model)
        check_finite(job.model)
        pages = pages_of(job.model)
        if self.repair and pages is not None:
            needs = repair_bytes(job.model, described(job.model), self._repair_windows(job))
            if needs > pages.limit:
                raise MemoryLimitError(
                    f"repair with {self.repair} rows needs {human_bytes(needs)}, the limit is "
                    f"{human_bytes(pages.limit)}; give fewer rows or more memory"
                )
        seqlen = seqlen_of(job.model, self.seqlen)
        if self.seqlen is None:
            job.progress.note(f"windows of {seqlen} tokens; set seqlen to change this")
        job.record["seqlen"] = seqlen
        settings = {**self.to_dict(), "seqlen": seqlen, "metric": self.score.key}
        belongs_to = {
            "model": fingerprint(job.model),
            "data": job.data.digest,
            "tokens": job.data.token_digest(job.tokenizer()),
            "step": {key: value for key, value in settings.items() if key in _IN_SCORES},
        }
        return Pruning(job, self.score, belongs_to)

    def windows(self, job: Job, samples: int, seed: int) -> torch.Tensor:
        """Calibration windows from ``samples`` rows."""
        return windows_for(
            job.model, job.tokenizer(), job.data.sample(samples, seed), seqlen_of(job.model, self.seqlen)
        )

    def cut(self, pruning: Pruning, job: Job) -> None:
        """Refit the remaining weights if asked to, and cut the model."""
        pruning.cut(self._repair_windows(job) if self.repair else None, self.ridge)

    def removals(self, blocks: int) -> float:
        """The expected number of removals, in whole blocks of ``blocks``, for an estimate."""
        raise NotImplementedError

    def _repair_windows(self, job: Job) -> torch.Tensor:
        return self.windows(job, self.repair, self.seed + 2)


class Pruner(TextPruner):
    """Settings shared by every pruner that removes a share of the model."""

    needs: ClassVar[frozenset[str]] = TextPruner.needs | {"ratio"}

    ratio: float = setting(
        "Share of all parameters to remove, embeddings included: 0.2 makes the model a fifth smaller. The"
        " result exceeds it by less than one unit, the smallest part that can be removed: a block, a "
        "group of channels, a key-value group.",
        above=0,
        below=1,
        error=RatioError,
    )

    def removals(self, blocks: int) -> float:
        return self.ratio * blocks

    def goal(self, pruning: Pruning) -> Goal:
        """The end of the search."""
        return Goal(pruning.budget, self.ratio)

    def finish(self, pruning: Pruning, job: Job, moves: Moves, windows: torch.Tensor | None = None) -> None:
        """Put units back that exceed the ratio, refit if asked to, and cut the model.

        Arguments:
            moves: the smallest of them in the dense model is the unit by which the result may exceed the ratio.
            windows: calibration windows to score the result on after units were put back; None for no score.

        Raises:
            RatioError: the result cannot be brought to less than one unit above the ratio.
        """
        pruning.settle(self.ratio, unit_of(pruning.budget, moves, pruning.anatomy), windows)
        self.cut(pruning, job)


class GreedyPruner(TextPruner):
    """Settings shared by every pruner that removes units greedily."""

    search: str = setting(
        "lazy scores only the units that may be best; exact scores every unit at every step; naive also recomputes "
        "every layer.",
        default="lazy",
        choices=MODES,
    )

    slack: float = setting(
        "lazy: share by which the loss increase of a unit is assumed to fall at most since it was last scored.",
        default=0.3,
        at_least=0,
        at_most=1,
    )

    refresh: int = setting(
        "lazy: number of steps after which every unit is scored again; 0 for never.", default=16, at_least=0
    )

    per: str = setting(
        "Cost by which the loss increase of a unit is divided: unit (not at all), parameters, macs, bytes (that "
        "decoding reads), or prefill or decode (milliseconds, measured on this machine first).",
        default=UNIT,
        choices=(UNIT, *COSTS),
    )

    ratio_of: str = setting(
        "Cost that the ratio is a share of: parameters, macs, bytes (that decoding reads), or prefill or decode "
        "(milliseconds, measured on this machine first).",
        default=COSTS[0],
        choices=COSTS,
    )

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:
        # every block once, then a few per removal; a score runs the layers behind the block, about half of them
        removals = self.removals(blocks)
        passes = blocks + PER_REMOVAL * removals
        if self.search in ("exact", "naive"):
            passes = max(passes, removals * blocks)
        return 0.6 * self.samples * row * passes, False

    def begin(self, job: Job) -> Pruning:
        pruning = super().begin(job)
        if self.ratio_of != COSTS[0]:
            pruning.budget = Budget.of(pruning.cost(self.ratio_of))
        return pruning

    def cut(self, pruning: Pruning, job: Job) -> None:
        if self.ratio_of != COSTS[0]:
            removed = pruning.budget.ratio(pruning.subnet)
            job.record["removed"] = {"of": self.ratio_of, "ratio": removed}
            job.show(Note(f"Removed of {self.ratio_of}, which the ratio is a share of: {removed:.2%}."))
        super().cut(pruning, job)

    def remove(
        self,
        pruning: Pruning,
        name: str,
        moves: Moves,
        windows: torch.Tensor,
        goal: Goal,
        units: Moves | None = None,
        most: float | None = None,
    ) -> None:
        """Remove units until a goal is reached or no moves are left.

        Arguments:
            name: of the stage.
            goal: a number of removals, or a ratio.
            units: all moves that later stages may make; default: ``moves``.
            most: the ratio of the whole search, which is exceeded by less than one unit; default: that of the goal.
        """
        if goal.ratio is not None:
            moves = fitting(pruning.budget, moves, most or goal.ratio, units)
        mode, per = self.search, None if self.per == UNIT else self.per
        pruning.remove_greedily(name, moves, windows, goal, mode=mode, slack=self.slack, refresh=self.refresh, per=per)


class OrderedPruner(TextPruner):
    """Settings shared by every pruner that narrows blocks."""

    order: str = setting(
        "Channels and heads to remove first: l1 (those with the smallest weights), activation (those that contribute "
        "least on calibration text), fisher (those without which the loss rises least), stored (the last ones), or "
        "your own as module:function.",
        default="l1",
        choices=(STORED,),
        names=IMPORTANCE,
    )


class WidthPruner(OrderedPruner, GreedyPruner):
    """Settings shared by every greedy pruner that narrows blocks."""

    mlp_group: int | None = setting(
        "MLP channels removed in one move. Default: a quarter of the hidden size. Of the state of a scan at most an "
        "eighth is removed at once.",
        default=None,
        at_least=1,
    )

    head_group: int = setting(
        "Key-value groups removed in one move, each with all query heads that share it; or heads of a scan, rounded up "
        "to as many in each of its groups; or whole groups of them.",
        default=1,
        at_least=1,
    )

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:
        return 4 * super().estimate(blocks, row)[0], False  # a block is removed in about four parts

    def mlp_groups(self, job: Job, anatomy: Anatomy) -> dict[str, int]:
        """Units removed in one move, for each axis of blocks other than attention."""
        return self._groups(job, anatomy, set(ROLES) - {"attention"})

    def head_groups(self, job: Job, anatomy: Anatomy) -> dict[str, int]:
        """Units removed in one move, for each axis of attention."""
        return self._groups(job, anatomy, {"attention"})

    def channel_group(self, job: Job) -> int:
        """Channels removed in one move."""
        return self.mlp_group or max(1, job.model.config.get_text_config(decoder=True).hidden_size // 4)

    def _groups(self, job: Job, anatomy: Anatomy, roles: Collection[str]) -> dict[str, int]:
        """One expert, ``head_group`` heads (or groups of these), ``mlp_group`` channels, or an eighth of a state."""
        channels = self.channel_group(job)
        axes = {axis.leader: axis for axis in sorted(anatomy.axes.values(), key=lambda axis: axis.size)}  # the widest
        groups = {}
        for name in anatomy.axes_of(roles):
            single = axes[name].unit == 1 and not axes[name].grouping  # channels, or one rank of a latent
            units = channels if single else self.head_group
            groups[name] = 1 if axes[name].active is not None else step_of(axes[name], units)
        return groups


# settings that scores depend on: a search that differs in other settings re-uses the same archive
_IN_SCORES = ("step", "samples", "width_samples", "seqlen", "metric", "seed", "order", "skip", "code")
