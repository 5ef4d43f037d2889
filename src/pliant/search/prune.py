"""Structured pruning by greedy search: the loop that BlockPruner and MultiPruner are made of."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pliant.anatomy import Anatomy, anatomy_of
from pliant.checkpoint.weights import check_finite, fingerprint
from pliant.elastic import Subnet, macs, parameters, ratio
from pliant.errors import DataError, RatioError
from pliant.measure.score import METRICS
from pliant.measure.walk import TOKENS_AT_ONCE, Walk, store_bytes
from pliant.measure.windows import windows_for
from pliant.progress import duration, size
from pliant.search.archive import Archive
from pliant.search.cut import cut_exactly
from pliant.search.greedy import Greedy, Move
from pliant.step import Job, Step, StepError

Moves = Callable[[Subnet], Sequence[Move]]


def block_moves(anatomy: Anatomy, kinds: Sequence[str] = ("attention", "mlp")) -> Moves:
    """Remove a whole block. The last attention of each type is never offered."""

    def moves(subnet: Subnet) -> list[Move]:
        alive = [b for b in anatomy.blocks.values() if b.name not in subnet.skip]
        left = [anatomy.layer_types[b.layer] for b in alive if b.spec.slot]
        return [
            Move(b.name, subnet.without(b.name))
            for b in alive
            if b.kind in kinds and not (b.spec.slot and left.count(anatomy.layer_types[b.layer]) == 1)
        ]

    return moves


def width_moves(anatomy: Anatomy, kind: str, group: int) -> Moves:
    """Take ``group`` units off the end of an axis of a block of one kind; something always stays."""
    axes = [axis for block in anatomy.blocks.values() if block.kind == kind for axis in block.leaders]

    def moves(subnet: Subnet) -> list[Move]:
        kept = dict(subnet.keep)
        found = []
        for axis in axes:
            left = kept.get(axis.name, axis.size) - group
            if axis.name.rpartition(".")[0] not in subnet.skip and left > 0:
                found.append(Move(axis.name, subnet.keeping(axis.name, left)))
        return found

    return moves


def reach(anatomy: Anatomy, stages: Sequence[Moves]) -> float:
    """The largest ratio that these stages can come to, whatever their order and shares."""
    subnet = Subnet()
    for moves in stages:
        while offered := moves(subnet):
            subnet = offered[-1].subnet
    return ratio(anatomy, subnet)


@dataclass(frozen=True, kw_only=True)
class GreedyPruner(Step):
    """Settings shared by every system that removes units greedily."""

    ratio: float
    """Share of all parameters to remove, embeddings included: 0.2 makes the model a fifth smaller."""

    samples: int = 256
    """Rows of calibration text for choosing blocks."""

    seqlen: int = 2048
    """Tokens in a calibration window."""

    metric: str = "perplexity"
    """What a removal must not hurt: perplexity, or kl (divergence from the dense model's predictions)."""

    search: str = "lazy"
    """lazy scores only what may be best; exact scores everything at every step; naive also recomputes every layer."""

    slack: float = 0.0
    """lazy: nats per token that a unit may hurt less than when last looked at and still be found."""

    refresh: int = 16
    """lazy: look at everything again every so many steps; 0 never does."""

    seed: int = 42
    """Seed of the draw of calibration rows."""

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < 1:
            raise RatioError(
                f"ratio is the share of parameters to remove, between 0 and 1 without either; not {self.ratio!r}"
            )
        self._check_counts(samples=1, seqlen=2)
        if self.metric not in METRICS:
            raise StepError(f"there is no metric {self.metric!r}; there are {', '.join(METRICS)}")
        try:
            self.greedy()
        except ValueError as error:
            raise StepError(str(error)) from None

    def _check_counts(self, **least: int) -> None:
        """Refuse a setting that is no whole number of at least so much; None is for settings that may be left out."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise StepError(f"{name} is a whole number, not {value!r}")
            if value < smallest:
                raise StepError(f"{name} must be at least {smallest}, it is {value}")

    def greedy(self) -> Greedy:
        """How to look, from the settings."""
        return Greedy(self.search, self.slack, self.refresh)

    def begin(self, job: Job) -> Pruning:
        """Check the model and the data, and open the archive."""
        if job.data is None:
            raise DataError(f"{self.kind} needs calibration text: pass data=pliant.text('some.txt')")
        check_finite(job.model)
        belongs_to = {
            "model": fingerprint(job.model),
            "data": job.data.digest,
            "tokens": job.data.token_digest(job.tokenizer()),
            "step": {key: value for key, value in self.to_dict().items() if key not in _NOT_IN_SCORES},
        }
        return Pruning(job, self.greedy(), self.metric, belongs_to)

    def windows(self, job: Job, samples: int, seed: int) -> torch.Tensor:
        """Calibration windows from ``samples`` rows."""
        return windows_for(job.model, job.tokenizer(), job.data.sample(samples, seed), self.seqlen)

    def check_reach(self, anatomy: Anatomy, stages: Sequence[Moves]) -> None:
        """Refuse a ratio that these stages cannot come to even together, before any work is done."""
        most = reach(anatomy, stages)
        if most < self.ratio:
            raise RatioError(f"ratio {self.ratio} cannot be reached: removing all that may go comes to {most:.4f}")


# what a score does not depend on: a search that differs only in these goes on with the same archive
_NOT_IN_SCORES = ("ratio", "search", "slack", "refresh", "split", "mlp_group", "head_group", "blocks")


@dataclass
class Pruning:
    """One search over one model, in stages.

    Arguments:
        job: model, progress and where the archive lives.
        greedy: how to look.
        metric: ``perplexity`` or ``kl``.
        belongs_to: what the scores depend on, for the archive.
    """

    job: Job
    greedy: Greedy
    metric: str
    belongs_to: dict[str, Any]
    anatomy: Anatomy = field(init=False)
    subnet: Subnet = field(init=False, default_factory=Subnet)
    points: list[dict[str, Any]] = field(init=False, default_factory=list)
    counters: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.anatomy = anatomy_of(self.job.model)
        path = None if self.job.work is None else self.job.work / "search.jsonl"
        self.archive = Archive(path, self.belongs_to)

    def stage(self, name: str, moves: Moves, windows: torch.Tensor, until: float) -> None:
        """Remove units until ``ratio >= until`` or nothing is left to offer."""
        began = time.monotonic()
        walk = Walk(self.job.model, self.anatomy, windows, metric=self.metric, reuse=self.greedy.mode != "naive")
        pool = f"{name}:{self.metric}"
        seen = made = 0
        start, offered = ratio(self.anatomy, self.subnet), moves(self.subnet)
        first = len(offered)
        typical = statistics.median([ratio(self.anatomy, move.subnet) - start for move in offered] or [1.0])

        def score(subnet: Subnet) -> float:
            nonlocal seen
            known = self.archive.get(pool, subnet)
            if known is None:
                tick = time.monotonic()
                known = walk.score(subnet)
                spent = time.monotonic() - tick
                self.archive.put(pool, subnet, known, spent)
                if seen == 0:  # the whole model has just been run once: now the cost can be told
                    self._tell_cost(spent, self._scores_left(0, 0, first, start, until, typical))
            seen += 1
            left = self._scores_left(seen, made, first, start, until, typical)
            text = f"ratio {ratio(self.anatomy, self.subnet):.3f} of {until:.3f}, {made} removed, {seen} scored"
            self.job.progress.step(seen / (seen + left), text)
            return known

        def committed(move: Move, loss: float) -> None:
            nonlocal made
            made += 1
            self.subnet = move.subnet
            walk.rebase(move.subnet)
            self.points.append(
                {
                    "stage": name,
                    "unit": move.unit,
                    "loss": loss,
                    "perplexity": math.exp(min(loss, 700)) if self.metric == "perplexity" else None,
                    "ratio": ratio(self.anatomy, move.subnet),
                    "parameters": parameters(self.anatomy, move.subnet),
                    "macs": macs(self.anatomy, move.subnet),
                }
            )

        with self.job.progress.stage(name):
            self._tell_memory(windows, first)
            walk.rebase(self.subnet)
            try:
                self.greedy.run(self.subnet, moves, score, lambda s: ratio(self.anatomy, s) < until - 1e-12, committed)
            finally:
                walk.close()
        self.counters[name] = {
            "steps": made,
            "scores": seen,
            "evaluations": walk.evaluations,
            "replayed": seen - walk.evaluations,
            "block_forwards": walk.block_forwards,
            "seconds": time.monotonic() - began,
            "windows": list(windows.shape),
        }

    def require(self, target: float) -> None:
        """Raises:
        RatioError: when the stages ran dry before ``target``.
        """
        reached = ratio(self.anatomy, self.subnet)
        if reached < target - 1e-12:
            raise RatioError(f"nothing is left to remove at ratio {reached:.4f}; {target} was asked for")

    def cut(self) -> None:
        """Make the result permanent, after proving that cutting does not change what was scored."""
        cut_exactly(self.job.model, self.anatomy, self.subnet)
        self.job.record.update(
            ratio=ratio(self.anatomy, self.subnet),
            subnet=self.subnet.to_dict(),
            points=self.points,
            counters=self.counters,
            evaluations=len(self.archive),
        )

    def _tell_memory(self, windows: torch.Tensor, first: int) -> None:
        model = self.job.model
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        hidden = store_bytes(model, self.anatomy, windows.numel())
        logits = 8 * TOKENS_AT_ONCE * model.get_input_embeddings().num_embeddings
        self.job.progress.note(
            f"  {first} candidates, {windows.shape[0]} windows of {windows.shape[1]} tokens; needs about "
            f"{size(weights + hidden + logits)} of memory: weights {size(weights)}, hidden states {size(hidden)}, logits "
            f"{size(logits)}"
        )

    def _tell_cost(self, whole: float, scores: float) -> None:
        # with prefixes re-used a score takes the layers behind the candidate, half of them on average, and the head
        each = whole * (1.0 if self.greedy.mode == "naive" else 0.6)
        self.job.progress.note(
            f"  the model takes {duration(whole)} on them; about {scores:.0f} scores, {duration(scores * each)}"
        )

    def _scores_left(self, seen: int, made: int, first: int, start: float, until: float, typical: float) -> float:
        """Scores still to come: the first step looks at everything, a lazy one after it at what is near.

        Arguments:
            typical: ratio that one removal gains, before any was made.
        """
        now = ratio(self.anatomy, self.subnet)
        steps = max(0.0, until - now) / ((now - start) / made if made else typical)
        if self.greedy.mode != "lazy":
            return max(0, first - seen) + first * max(0.0, steps - (0 if made else 1))
        per_step = max(1.0, (seen - first) / made) if made else 3.0
        again = steps // self.greedy.refresh * first if self.greedy.refresh else 0
        return max(0, first - seen) + per_step * steps + again
