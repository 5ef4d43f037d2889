"""One look at the gradient: where the loss depends least on channels and heads, layers become narrower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from pliant.anatomy import Anatomy
from pliant.criteria.unit_fisher import damage_of_units
from pliant.criteria.unit_readers import read_axes
from pliant.elastic import Subnet, ratio
from pliant.errors import RatioError, StepError
from pliant.measure.cost import COSTS, Cost
from pliant.prune.moves import step_moves
from pliant.prune.settings import OrderedPruner
from pliant.prune.unit_order import ordered
from pliant.prune.width_cuts import cut_until, narrowed, widths
from pliant.searches.greedy import Move, check_loss
from pliant.step import Job, setting

Cuts = list[tuple[str, int]]


class FisherPruner(OrderedPruner):
    """Narrow MLPs and attentions where the loss depends on them least, without a search: the Fisher information of every
    channel and head is taken once (Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022), and what
    does the least damage for what it saves goes, wherever it is. Within a layer units go in ``order``. Takes a few passes over
    the text."""

    kind: ClassVar[str] = "fisher"

    group: int = setting(
        "Elements that come and go together, and what is left is a multiple of; heads go one key-value "
        "group at a time.",
        default=32,
        at_least=1,
    )

    per: str = setting(
        "Remove what hurts least per: parameters, macs, bytes (that decoding reads), or prefill or decode"
        " (milliseconds, measured on this machine first).",
        default="parameters",
        choices=COSTS,
    )

    order: str = "activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.key != "perplexity":
            raise StepError(
                "at the dense model the divergence from it has no gradient; metric can only be perplexity here"
            )

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        self._reaching(
            [(axis.name, units) for axis in read_axes(anatomy) for units in widths(axis, self.group)], anatomy
        )
        windows = self.windows(job, self.samples, self.seed)
        with ordered(job, anatomy, self.order, windows):
            with job.progress.stage("fisher information"):
                damage = damage_of_units(job.model, anatomy, windows, job.progress)
            for of_units in damage.values():
                check_loss(of_units.sum().item())
            subnet = self._reaching(self._cuts(anatomy, damage, pruning.cost(self.per)), anatomy)
            pruning.commit("fisher information", Move("all", subnet), None)
            self.finish(pruning, job, step_moves(read_axes(anatomy), self.group))

    def _cuts(self, anatomy: Anatomy, damage: Mapping[str, torch.Tensor], cost: Cost) -> Cuts:
        """Every cut there is, what hurts least for what it saves first."""
        whole = cost(Subnet())
        ranked = []
        for name, of_units in damage.items():
            before, kept, turn = whole, len(of_units), 0.0
            for left in widths(anatomy.axes[name], self.group):
                after = cost(narrowed([(name, left)]))
                # a group cannot go before those behind it, even where it does less damage than they do
                turn = max(turn, of_units[left:kept].sum().item() / max(1e-9, before - after))
                ranked.append((turn, name, -left))
                before, kept = after, left
        return [(name, -left) for _, name, left in sorted(ranked)]

    def _reaching(self, cuts: Cuts, anatomy: Anatomy) -> Subnet:
        found = cut_until(cuts, lambda subnet: ratio(anatomy, subnet), self.ratio)
        if found is None:
            most = ratio(anatomy, narrowed(cuts))
            raise RatioError(f"ratio {self.ratio} cannot be reached: narrowing all that may be comes to {most:.4f}")
        return found
