"""One search over one model: archive, trade curve, counters, and the cut at the end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.elastic import Elastic, Subnet, described, macs, parameters, ratio
from pliant.errors import RatioError
from pliant.formatting import duration, human_bytes
from pliant.forward.windows import tokens_at_once
from pliant.measure.cost import Cost, cost_of
from pliant.measure.model_scorer import ModelScorer
from pliant.measure.prefix_scorer import Footprint, PrefixScorer, footprint
from pliant.measure.scores import Score
from pliant.pages import pages_of
from pliant.prune.known_subnet import cut_exactly
from pliant.prune.moves import Moves
from pliant.prune.put_back import Removal, put_backs
from pliant.prune.removal_record import refits, removals
from pliant.prune.repair import repair
from pliant.searches.archive import Archive
from pliant.searches.greedy import Greedy, Move, check_loss
from pliant.step import Job

ARCHIVE = "search.jsonl"
PUT_BACK = "put back"  # the stage that takes back what was too much
PER_REMOVAL = 5.0  # scores that a lazy search takes for one, as long as it has made none


class Scorer:
    """Losses of sub-networks: from the archive where they are known, measured and kept where not.

    Attributes:
        seen: scores given so far.
        seconds: what the last measured one took.
    """

    def __init__(self, archive: Archive, walk: PrefixScorer | ModelScorer, pool: str, told: Callable[[Scorer], None]):
        self.archive, self.walk, self.pool, self.told = archive, walk, pool, told
        self.seen = 0
        self.seconds = 0.0

    def __call__(self, subnet: Subnet) -> float:
        """The loss, of which less is better."""
        known = self.archive.get(self.pool, subnet)
        if known is None:
            tick = time.monotonic()
            known = self.walk.score(subnet)
            self.seconds = time.monotonic() - tick
            self.archive.put(self.pool, subnet, known, self.seconds, self.walk.tokens)
        self.seen += 1
        self.told(self)
        return known


@dataclass
class Pruning:
    """One search over one model, in stages.

    Arguments:
        job: model, progress and where the archive lives.
        metric: what a removal must not hurt.
        belongs_to: what the scores depend on, for the archive.
    """

    job: Job
    metric: Score
    belongs_to: dict[str, Any]
    anatomy: Anatomy = field(init=False)
    subnet: Subnet = field(init=False, default_factory=Subnet)
    points: list[dict[str, Any]] = field(init=False, default_factory=list)
    removals: list[Removal] = field(init=False, default_factory=list)
    counters: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.anatomy = described(self.job.model)
        path = self.job.file(ARCHIVE, lambda earlier: Archive(earlier, self.belongs_to))
        self.archive = Archive(path, self.belongs_to)

    def stage(
        self,
        name: str,
        moves: Moves,
        windows: torch.Tensor,
        until: float,
        *,
        mode: str,
        slack: float,
        refresh: int,
        per: str | None = None,
    ) -> None:
        """Remove units until ``ratio >= until`` or nothing is left to offer.

        Arguments:
            mode, slack, refresh: how to look, see :class:`pliant.searches.greedy.Greedy`.
            per: the cost by which damage is divided; None to remove what hurts least whatever its size.
        """
        cost = None if per is None else self.cost(per)
        start, offered = ratio(self.anatomy, self.subnet), moves(self.subnet)
        first = len(offered)
        typical = statistics.median([ratio(self.anatomy, move.subnet) - start for move in offered] or [1.0])
        greedy = Greedy(
            self.subnet,
            moves,
            lambda s: ratio(self.anatomy, s) < until - 1e-12,
            lambda s, move: 1.0 if cost is None else max(1e-9, cost(s) - cost(move.subnet)),
            mode,
            slack,
            refresh,
        )
        made = 0

        def told(scorer: Scorer) -> None:
            left = self._scores_left(greedy, scorer.seen, made, first, start, until, typical)
            if scorer.seen == scorer.walk.evaluations == 1:  # the whole model has just been run: the cost can be told
                self._tell_cost(greedy, scorer.seconds, left)
            text = f"ratio {ratio(self.anatomy, self.subnet):.3f} of {until:.3f}, {made} removed, {scorer.seen} scored"
            self.job.progress.step(scorer.seen / (scorer.seen + left), text)

        with self.scoring(name, windows, reuse=greedy.mode != "naive", told=told) as score:
            self.job.progress.note(f"  {first} candidates")

            while not greedy.done:
                for candidate in greedy.ask():
                    greedy.tell(candidate, [score(candidate)])
                for move, loss in greedy.taken[made:]:
                    made += 1
                    before = self.archive.get(score.pool, self.subnet)
                    score.walk.rebase(move.subnet)
                    self.commit(name, move, loss, math.nan if before is None else loss - before)
        self.counters[name]["steps"] = made

    @contextmanager
    def scoring(
        self,
        name: str,
        windows: torch.Tensor,
        *,
        reuse: bool = True,
        told: Callable[[Scorer], None] = lambda _scorer: None,
        metric: Score | None = None,
        beside: Scorer | None = None,
    ) -> Iterator[Scorer]:
        """A stage of scoring sub-networks, the archive asked first; prefixes of the present sub-network are re-used.

        Arguments:
            told: called after every score.
            metric: what is scored; default: what a removal must not hurt.
            beside: a scorer that is used in turn with this one, for a search with several objectives.
        """
        metric, elastic = metric or self.metric, None if beside is None else beside.walk.elastic
        began = time.monotonic()
        model, anatomy = self.job.model, self.anatomy
        if metric.on_windows:
            walk = self._prefix_scorer(windows, metric, reuse, elastic)
        else:
            walk = ModelScorer(model, anatomy, metric, self.job.tokenizer, elastic)
        scorer = Scorer(self.archive, walk, f"{name}:{metric.key}", told)
        with self.job.progress.stage(name):
            if isinstance(walk, PrefixScorer):
                self._tell_memory(windows, footprint(model, anatomy, windows, metric))
            walk.rebase(self.subnet)
            try:
                yield scorer
            finally:
                walk.close()
        self.counters[name] = {
            "steps": 1,
            "scores": scorer.seen,
            "evaluations": walk.evaluations,
            "replayed": scorer.seen - walk.evaluations,
            "block_forwards": walk.block_forwards,
            "seconds": time.monotonic() - began,
            "windows": list(windows.shape),
            "tokens": walk.tokens,
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

    def cost(self, per: str) -> Cost:
        """A cost by name, see :func:`pliant.measure.cost.cost_of`; what is measured for it is kept beside the archive."""
        return cost_of(per, self.job.model, self.anatomy, self.job.file(f"latency-{per}.json"))

    def commit(self, stage: str, move: Move, loss: float | None, hurt: float = math.nan) -> None:
        """Take a move, and mark the point it leads to on the trade curve.

        Arguments:
            loss: of the sub-network after it, None where it was not measured.
            hurt: how much the removal hurt, in the method's own measure; NaN where that is unknown.
        """
        self.removals.append(Removal(move.unit, self.subnet, move.subnet, hurt))
        self._mark(stage, move, loss)

    def settle(self, target: float, unit: int, windows: torch.Tensor | None = None) -> None:
        """Put removed units back until the ratio is less than one unit above ``target``.

        Arguments:
            unit: parameters of the smallest unit.
            windows: what the sub-networks after it are scored on; None leaves them without a score.

        Raises:
            RatioError: the stages ran dry before ``target``, or no selection of what they removed ends within one unit of it.
        """
        self.require(target)
        back = put_backs(self.anatomy, self.removals, target, unit)
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
                score.walk.rebase(self.subnet)
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
                "ratio": ratio(self.anatomy, move.subnet),
                "parameters": parameters(self.anatomy, move.subnet),
                "macs": macs(self.anatomy, move.subnet),
            }
        )

    def require(self, target: float) -> None:
        """Raises:
        RatioError: when the stages ran dry before ``target``.
        """
        reached = ratio(self.anatomy, self.subnet)
        if reached < target - 1e-12:
            raise RatioError(f"nothing is left to remove at ratio {reached:.4f}; {target} was asked for")

    def cut(self, windows: torch.Tensor | None = None, ridge: float = 1.0) -> None:
        """Make the result permanent, after proving that cutting does not change what was scored.

        Arguments:
            windows: calibration windows to refit what stays on; None leaves the weights as they are.
        """
        if windows is not None:
            with self.job.progress.stage("repair"):
                fits = repair(self.job.model, self.anatomy, self.subnet, windows, ridge, self.job.progress)
                self.job.record["repair"] = fits
                self.job.show(*refits(fits))
        cut_exactly(self.job.model, self.anatomy, self.subnet)
        self.job.show(*removals(self.points, self.counters))
        self.job.record.update(
            ratio=ratio(self.anatomy, self.subnet),
            subnet=self.subnet.to_dict(),
            points=self.points,
            counters=self.counters,
            evaluations=len(self.archive),
        )

    def _tell_memory(self, windows: torch.Tensor, needs: Footprint) -> None:
        pages = pages_of(self.job.model)
        within = "" if pages is None else f"; the limit is {human_bytes(pages.limit)}, weights beyond it are read again"
        self.job.progress.note(
            f"  {windows.shape[0]} windows of {windows.shape[1]} tokens; needs about {human_bytes(needs.total)} of memory: weights "
            f"{human_bytes(needs.weights)}, hidden states {human_bytes(needs.hidden)}, logits {human_bytes(needs.logits)}{within}"
        )

    def _tell_cost(self, greedy: Greedy, whole: float, scores: float) -> None:
        # with prefixes re-used a score takes the layers behind the candidate, half of them on average, and the head
        each = whole * (1.0 if greedy.mode == "naive" else 0.6)
        self.job.progress.note(
            f"  the model takes {duration(whole)} on them; about {scores:.0f} scores, {duration(scores * each)}"
        )

    def _scores_left(
        self, greedy: Greedy, seen: int, made: int, first: int, start: float, until: float, typical: float
    ) -> float:
        """Scores still to come: the first step looks at everything, a lazy one after it at what is near.

        Arguments:
            typical: ratio that one removal gains, before any was made.
        """
        now = ratio(self.anatomy, self.subnet)
        steps = max(0.0, until - now) / ((now - start) / made if made else typical)
        if greedy.mode in ("exact", "naive"):
            return max(0, first - seen) + first * max(0.0, steps - (0 if made else 1))
        per_step = max(1.0, (seen - first) / made) if made else PER_REMOVAL
        again = steps // greedy.refresh * first if greedy.refresh else 0
        return max(0, first - seen) + per_step * steps + again
