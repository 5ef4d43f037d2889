"""One pruning of one model: archive, trade curve, counters, and the cut at the end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.elastic import Elastic, Subnet, described, macs, parameters
from pliant.elastic import ratio as ratio_of
from pliant.errors import RatioError
from pliant.formatting import duration, human_bytes
from pliant.forward.windows import tokens_at_once
from pliant.measure.cost import Cost, cost_of
from pliant.measure.model_scorer import ModelScorer
from pliant.measure.prefix_scorer import Footprint, PrefixScorer, footprint
from pliant.measure.scores import Score
from pliant.pages import pages_of
from pliant.prune.known_subnet import extract_and_verify
from pliant.prune.moves import Moves, reach
from pliant.prune.put_back import Removal, put_backs
from pliant.prune.ratio_target import Budget, Goal, by_parameters, out_of_reach
from pliant.prune.removal_record import refits, removals
from pliant.prune.repair import repair
from pliant.searches.archive import Archive
from pliant.searches.greedy import Greedy, Move, check_loss
from pliant.step import Job

ARCHIVE = "search.jsonl"
PUT_BACK = "put back"  # the stage that restores units
PER_REMOVAL = 5.0  # scores per removal of a lazy search, before it has made any


class Scorer:
    """Losses of sub-networks: read from the archive if they are there, else measured and stored.

    Attributes:
        inner: the scorer that measures.
        seen: scores returned so far.
        seconds: duration of the last measurement.
    """

    def __init__(
        self, archive: Archive, inner: PrefixScorer | ModelScorer, pool: str, on_score: Callable[[Scorer], None]
    ):
        self.archive, self.inner, self.pool, self.on_score = archive, inner, pool, on_score
        self.seen = 0
        self.seconds = 0.0

    def __call__(self, subnet: Subnet) -> float:
        """The loss; lower is better."""
        loss = self.archive.get(self.pool, subnet)
        if loss is None:
            began = time.monotonic()
            loss = self.inner.score(subnet)
            self.seconds = time.monotonic() - began
            self.archive.put(self.pool, subnet, loss, self.seconds, self.inner.tokens)
        self.seen += 1
        self.on_score(self)
        return loss


@dataclass
class Pruning:
    """One pruning of one model, in stages.

    Arguments:
        job: model, progress and folder of the archive.
        metric: the score that removals should preserve.
        belongs_to: what the scores depend on, for the archive.

    Attributes:
        budget: the cost that ratios are a share of; all parameters, unless a pruner sets another.
    """

    job: Job
    metric: Score
    belongs_to: dict[str, Any]
    anatomy: Anatomy = field(init=False)
    budget: Budget = field(init=False)
    subnet: Subnet = field(init=False, default_factory=Subnet)
    points: list[dict[str, Any]] = field(init=False, default_factory=list)
    removals: list[Removal] = field(init=False, default_factory=list)
    counters: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.anatomy = described(self.job.model)
        self.budget = by_parameters(self.anatomy)
        path = self.job.file(ARCHIVE, lambda earlier: Archive(earlier, self.belongs_to))
        self.archive = Archive(path, self.belongs_to)

    def remove_greedily(
        self,
        name: str,
        moves: Moves,
        windows: torch.Tensor,
        goal: Goal,
        *,
        mode: str,
        slack: float,
        refresh: int,
        per: str | None = None,
    ) -> None:
        """Remove units until the goal is reached or no moves are left.

        Arguments:
            name: of the stage.
            mode, slack, refresh: see :class:`pliant.searches.greedy.Greedy`.
            per: the cost by which the loss increase is divided; None to ignore the size of a unit.
        """
        cost = None if per is None else self.cost(per)
        start, offered = self.budget.ratio(self.subnet), moves(self.subnet)
        first = len(offered)
        typical = statistics.median([self.budget.ratio(move.subnet) - start for move in offered] or [1.0])
        greedy = Greedy(
            self.subnet,
            moves,
            lambda s: not goal.reached(s, len(greedy.taken)),
            lambda s, move: 1.0 if cost is None else max(1e-9, cost(s) - cost(move.subnet)),
            mode,
            slack,
            refresh,
        )
        made = 0

        def show(scorer: Scorer) -> None:
            each = (self.budget.ratio(self.subnet) - start) / made if made else typical
            steps = goal.remaining(self.subnet, made, each)
            remaining = _remaining_scores(greedy, scorer.seen, made, first, steps)
            if scorer.seen == scorer.inner.evaluations == 1:  # the whole model has just been run, and its time is known
                self._note_cost(greedy, scorer.seconds, remaining)
            text = f"{goal.shown(self.subnet, made)}, {scorer.seen} scored"
            self.job.progress.step(scorer.seen / (scorer.seen + remaining), text)

        with self.scoring(name, windows, reuse=greedy.mode != "naive", on_score=show) as score:
            self.job.progress.note(f"  candidates: {first}")

            while not greedy.done:
                for candidate in greedy.ask():
                    greedy.tell(candidate, [score(candidate)])
                for move, loss in greedy.taken[made:]:
                    made += 1
                    before = self.archive.get(score.pool, self.subnet)
                    score.inner.rebase(move.subnet)
                    self.commit(name, move, loss, math.nan if before is None else loss - before)
        self.counters[name]["steps"] = made

    @contextmanager
    def scoring(
        self,
        name: str,
        windows: torch.Tensor,
        *,
        reuse: bool = True,
        on_score: Callable[[Scorer], None] = lambda _scorer: None,
        metric: Score | None = None,
        beside: Scorer | None = None,
    ) -> Iterator[Scorer]:
        """A stage that scores sub-networks, from the archive if possible; prefixes of the current sub-network are
        re-used.

        Arguments:
            on_score: called after every score.
            metric: the score to compute; default: the one that removals should preserve.
            beside: a scorer that is used in turn with this one, for a search with several objectives.
        """
        metric, elastic = metric or self.metric, None if beside is None else beside.inner.elastic
        began = time.monotonic()
        model, anatomy = self.job.model, self.anatomy
        if metric.on_windows:
            inner = self._prefix_scorer(windows, metric, reuse, elastic)
        else:
            inner = ModelScorer(model, anatomy, metric, self.job.tokenizer, elastic)
        scorer = Scorer(self.archive, inner, f"{name}:{metric.key}", on_score)
        with self.job.progress.stage(name):
            if isinstance(inner, PrefixScorer):
                self._note_memory(windows, footprint(model, anatomy, windows, metric))
            inner.rebase(self.subnet)
            try:
                yield scorer
            finally:
                inner.close()
        self.counters[name] = {
            "steps": 1,
            "scores": scorer.seen,
            "evaluations": inner.evaluations,
            "replayed": scorer.seen - inner.evaluations,
            "block_forwards": inner.block_forwards,
            "seconds": time.monotonic() - began,
            "windows": list(windows.shape),
            "tokens": inner.tokens,
        }

    def _prefix_scorer(
        self, windows: torch.Tensor, metric: Score, reuse: bool, elastic: Elastic | None
    ) -> PrefixScorer:
        needs = footprint(self.job.model, self.anatomy, windows, metric)
        tokens = tokens_at_once(self.job.model)
        if self.archive.tokens is not None:
            # a resumed search uses the same batch size, so sums round alike, if memory allows
            tokens = min(tokens, self.archive.tokens)
        return PrefixScorer(
            self.job.model,
            self.anatomy,
            windows,
            metric=metric,
            reuse=reuse,
            memory=needs.hidden,
            stretch=needs.stretch,
            tokens=tokens,
            elastic=elastic,
        )

    def check_reach(self, stages: Sequence[Moves], ratio: float) -> None:
        """Refuse a ratio that these stages together cannot reach, before any work is done."""
        most = reach(self.budget, stages)
        if most < ratio:
            raise out_of_reach(ratio, most, "removing everything that this pruner may remove")

    def cost(self, per: str) -> Cost:
        """A cost by name, see :func:`pliant.measure.cost.cost_of`; measured times are stored beside the archive."""
        return cost_of(per, self.job.model, self.anatomy, self.job.file(f"latency-{per}.json"))

    def commit(self, stage: str, move: Move, loss: float | None, hurt: float = math.nan) -> None:
        """Take a move, and add its result to the trade curve.

        Arguments:
            loss: of the sub-network after the move; None if it was not measured.
            hurt: the loss increase of the removal, or the method's own measure of it; NaN if unknown.
        """
        self.removals.append(Removal(move.unit, self.subnet, move.subnet, hurt))
        self._mark(stage, move, loss)

    def settle(self, ratio: float, unit: int, windows: torch.Tensor | None = None) -> None:
        """Put removed units back until the result is less than one unit above ``ratio``.

        Arguments:
            unit: cost of the smallest unit.
            windows: calibration windows to score the result on; None for no score.

        Raises:
            RatioError: the moves ran out before the ratio was reached, or no selection of removed units ends within one
                unit.
        """
        if not self.budget.reached(self.subnet, ratio):
            now = self.budget.ratio(self.subnet)
            raise RatioError(f"ratio {ratio} cannot be reached: no moves are left at {now:.4f}; give a smaller ratio")
        back = put_backs(self.budget, self.removals, ratio, unit, self.anatomy.coupled())
        if not back:
            return
        if windows is None:
            for removal in back:
                self._put_back(removal, None)
            return
        with self.scoring(PUT_BACK, windows) as score:
            for done, removal in enumerate(back, 1):
                check_loss(loss := score(removal.undone(self.subnet)))
                self._put_back(removal, loss)
                score.inner.rebase(self.subnet)
                self.job.progress.step(done / len(back), f"{removal.unit} is back, loss {loss:.4f}")
        self.counters[PUT_BACK]["steps"] = len(back)

    def _put_back(self, removal: Removal, loss: float | None) -> None:
        self.removals.remove(removal)
        self._mark(PUT_BACK, Move(f"{removal.unit} {PUT_BACK}", removal.undone(self.subnet)), loss)

    def _mark(self, stage: str, move: Move, loss: float | None) -> None:
        self.subnet = move.subnet
        self.points.append(
            {
                "stage": stage,
                "unit": move.unit,
                "loss": loss,
                "score": None if loss is None else self.metric.shown(loss),
                "label": self.metric.label,
                "ratio": ratio_of(self.anatomy, move.subnet),
                "parameters": parameters(self.anatomy, move.subnet),
                "macs": macs(self.anatomy, move.subnet),
            }
        )

    def cut(self, windows: torch.Tensor | None = None, ridge: float = 1.0) -> None:
        """Refit the remaining weights if asked to, cut the model, and verify that it computes the same as the scored
        one.

        Arguments:
            windows: calibration windows for the refit; None leaves the weights unchanged.
            ridge: see :func:`pliant.prune.repair.repair`.
        """
        if windows is not None:
            with self.job.progress.stage("repair"):
                fits = repair(self.job.model, self.anatomy, self.subnet, windows, ridge, self.job.progress)
                self.job.record["repair"] = fits
                self.job.show(*refits(fits))
        extract_and_verify(self.job.model, self.anatomy, self.subnet)
        self.job.show(*removals(self.points, self.counters))
        self.job.record.update(
            ratio=ratio_of(self.anatomy, self.subnet),
            subnet=self.subnet.to_dict(),
            points=self.points,
            counters=self.counters,
            evaluations=len(self.archive),
        )

    def _note_memory(self, windows: torch.Tensor, needs: Footprint) -> None:
        pages = pages_of(self.job.model)
        limit = "" if pages is None else f"; the limit is {human_bytes(pages.limit)}, weights beyond it are read again"
        self.job.progress.note(
            f"  {windows.shape[0]} windows of {windows.shape[1]} tokens; needs about {human_bytes(needs.total)} of "
            f"memory: weights {human_bytes(needs.weights)}, hidden states {human_bytes(needs.hidden)}, logits "
            f"{human_bytes(needs.logits)}{limit}"
        )

    def _note_cost(self, greedy: Greedy, whole: float, scores: float) -> None:
        # with prefixes re-used a score takes the layers behind the candidate, half of them on average, and the head
        each = whole * (1.0 if greedy.mode == "naive" else 0.6)
        self.job.progress.note(
            f"  the model takes {duration(whole)} on them; about {scores:.0f} scores, {duration(scores * each)}"
        )


def _remaining_scores(greedy: Greedy, seen: int, made: int, first: int, steps: float) -> float:
    """Estimated number of further scores: the first step scores every move, later lazy steps only a few.

    Arguments:
        first: moves offered at the beginning of the stage.
        steps: further removals.
    """
    if greedy.mode in ("exact", "naive"):
        return max(0, first - seen) + first * max(0.0, steps - (0 if made else 1))
    per_step = max(1.0, (seen - first) / made) if made else PER_REMOVAL
    again = steps // greedy.refresh * first if greedy.refresh else 0
    return max(0, first - seen) + per_step * steps + again
