"""Mamba-Shedder: remove blocks, scans and their parts from state-space models and hybrids.

Muñoz et al., "Mamba-Shedder: Post-Transformer Compression for Efficient Selective Structured State Space Models", 2025
(arXiv 2501.17088).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from pliant.anatomy import Anatomy, Axis
from pliant.errors import RatioError, StepError
from pliant.prune import GreedyPruner, WidthPruner, pooled
from pliant.prune.moves import Moves, exhausted, unit_of
from pliant.prune.ratio_target import Goal
from pliant.prune.scan_skip import KEPT, SKIP_HELP, SKIPS, skip_note, with_skips
from pliant.prune.session import Pruning
from pliant.prune.targets import PARTS, axes_of, moves_of, roles_of, targets_of
from pliant.prune.unit_order import STORED, ordered
from pliant.step import Job
from pliant.step_setting import setting

_SETTINGS = {"channels": "mlp_group", "scan_channels": "mlp_group", "heads": "head_group", "state": "state_group"}
"""Target -> the setting that says how many units one move removes."""


class Search(NamedTuple):
    """One stage: what may be removed, and how much, as a number of removals or as a ratio."""

    targets: tuple[str, ...]
    steps: int | None
    ratio: float | None

    @property
    def name(self) -> str:
        return "+".join(self.targets) or "all"


class MambaShedder(WidthPruner):
    """Remove from a state-space model or a hybrid the part without which the loss rises least, again and again: from
    one pool, or in stages as the paper does for hybrids."""

    target: str | None = setting(
        "Parts in the pool, joined by '+': block (a block with a scan), ssm (its scan alone), attention, mlp; channels "
        "(of MLPs), heads, groups (of heads) and state (of scans), scan_channels (of Mamba-1). Default: all that the "
        "model has of block, ssm, attention and mlp.",
        default=None,
    )

    steps: int | None = setting("Number of removals. Give this, ratio or stages.", default=None, at_least=1)

    ratio: float | None = setting(
        "Share of all parameters to remove; the result exceeds it by less than one part.",
        default=None,
        above=0,
        below=1,
        error=RatioError,
    )

    stages: str | None = setting(
        "Several searches in turn, such as 'block+attention+mlp:3, channels:20, ssm:18'. A whole number counts "
        "removals; a fraction is the share of all parameters that the stage removes.",
        default=None,
    )

    skip: str = setting(SKIP_HELP, default=KEPT, choices=SKIPS)

    mlp_group: int | None = setting(
        "Channels of MLPs, or of the scans of Mamba-1, removed in one move. Default: a quarter of the hidden size.",
        default=None,
        at_least=1,
    )

    head_group: int = setting(
        "Scan heads removed in one move, from each group of heads that shares B and C.", default=1, at_least=1
    )

    state_group: int | None = setting(
        "Units of the state removed in one move. Default: an eighth of the state.", default=None, at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(amount is not None for amount in (self.steps, self.ratio, self.stages)) != 1:
            raise StepError("give exactly one of steps (a number of removals), ratio (a share) and stages")
        if self.stages is not None and self.target is not None:
            raise StepError("stages names the targets of every stage; leave target out")
        self.searches()

    def searches(self) -> list[Search]:
        """The stages.

        Raises:
            StepError: a stage is empty or has no amount, or a target is unknown or comes twice.
        """
        if self.stages is None:
            found = [Search(() if self.target is None else targets_of(self.target), self.steps, self.ratio)]
        else:
            found = [_search(stage) for stage in self.stages.split(",")]
        named = [target for search in found for target in search.targets]
        if twice := [target for target in named if named.count(target) > 1]:
            raise StepError(f"{twice[0]} comes twice in {self.stages or self.target!r}; give each target once")
        if sum(search.ratio or 0 for search in found) >= 1:
            raise StepError(f"the fractions of stages must add up to less than 1; not {self.stages!r}")
        return found

    def removals(self, blocks: int) -> float:
        return sum(search.steps or (search.ratio or 0) * blocks for search in self.searches())

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:
        return GreedyPruner.estimate(self, blocks, row)

    def run(self, job: Job) -> None:
        pruning, searches = self.begin(job), self.searches()
        anatomy = pruning.anatomy
        kinds = [self._moves(job, anatomy, search.targets) for search in searches]
        total = None if any(search.steps for search in searches) else sum(search.ratio or 0 for search in searches)
        _check_amounts(pruning, searches, kinds, total)
        everything = pooled(*(moves for of_stage in kinds for moves in of_stage))
        windows = self.windows(job, self.samples, self.seed)
        narrows = any(target in PARTS for search in searches for target in search.targets)
        with ordered(job, anatomy, self.order if narrows else STORED, windows):
            pruning.anatomy = with_skips(job, anatomy, self.skip, windows)
            until = 0.0
            for search, of_stage in zip(searches, kinds, strict=True):
                until += search.ratio or 0
                goal = Goal(pruning.budget, None if search.steps else until, search.steps)
                # an early stage of several ratios does not overshoot the last one
                units = None if total is None or search is searches[-1] else everything
                self.remove(pruning, search.name, pooled(*of_stage), windows, goal, units, total)
                made = pruning.counters[search.name]["steps"]
                if not goal.reached(pruning.subnet, made):
                    raise RatioError(
                        f"{search.name}: no moves are left at {goal.shown(pruning.subnet, made)}; give a smaller number"
                    )
                if search.steps:
                    until = pruning.budget.ratio(pruning.subnet)
            if total is not None:
                pruning.settle(total, unit_of(pruning.budget, pooled(*kinds[-1]), pruning.anatomy), windows)
            job.show(*skip_note(anatomy, pruning.subnet, self.skip))
            self.cut(pruning, job)

    def _moves(self, job: Job, anatomy: Anatomy, targets: Sequence[str]) -> list[Moves]:
        """The moves of a stage.

        Raises:
            StepError: the model does not have what a target names, or a group does not divide it.
        """
        groups = {target: self._units_per_move(job, anatomy, target) for target in PARTS}
        for target in targets:
            for name, group in groups[target].items() if target in _SETTINGS else ():
                size = anatomy.axes[name].size
                if group >= size or (target in ("state", "heads") and size % group):
                    raise StepError(
                        f"target {target!r}: {name} has {size} units and cannot be narrowed in groups of {group}; "
                        f"give another {_SETTINGS[target]}"
                    )
        return moves_of(anatomy, targets, groups, f"this {job.model.config.model_type} model")

    def _units_per_move(self, job: Job, anatomy: Anatomy, target: str) -> dict[str, int]:
        """Full name of an axis -> units removed in one move."""

        def group(axis: Axis) -> int:
            if target == "state":
                return self.state_group or max(1, axis.size // 8)
            if target == "groups":
                return 1
            return self.head_group * axis.groups if target == "heads" else self.channel_group(job)

        return {axis.name: group(axis) for axis in axes_of(anatomy, target)}


def _search(stage: str) -> Search:
    targets, colon, amount = (part.strip() for part in stage.partition(":"))
    with contextlib.suppress(ValueError):
        number = float(amount)
        if colon and targets and number >= 1 and amount.isdigit():
            return Search(targets_of(targets), int(amount), None)
        if colon and targets and 0 < number < 1:
            return Search(targets_of(targets), None, number)
    raise StepError(
        "a stage is written as targets:amount with a whole number of removals or a fraction below 1, such as "
        f"block+attention:3 or ssm:0.02; not {stage.strip()!r}"
    )


def _check_amounts(
    pruning: Pruning, searches: Sequence[Search], kinds: Sequence[Sequence[Moves]], total: float | None
) -> None:
    """Refuse more than there is, before any work is done.

    Arguments:
        total: the ratio of all stages together; None if some count removals.
    """
    for search, of_stage in zip(searches, kinds, strict=True):
        if search.steps is not None and (reached := exhausted(of_stage))[1] < search.steps:
            subnet, most = reached
            roles = roles_of(search.targets)
            held = any(block.role in roles for block in pruning.anatomy.alive(subnet.skip))
            reason = ", because the last block that keeps a state stays" if held else ""
            raise StepError(
                f"{search.name}: {search.steps} removals are more than there can be; give at most {most}{reason}"
            )
        if search.ratio is not None:
            pruning.check_reach(of_stage, search.ratio)
    if total is not None:
        pruning.check_reach([moves for of_stage in kinds for moves in of_stage], total)
