"""Narrow layers where the loss depends least on channels and heads, by the Fisher information, without a search."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch

from pliant.anatomy import Anatomy
from pliant.criteria.unit_fisher import loss_increases
from pliant.criteria.unit_readers import measured_axes
from pliant.elastic import Subnet, ratio
from pliant.errors import StepError
from pliant.measure.cost import COSTS, Cost
from pliant.prune.moves import settled, step_moves
from pliant.prune.ratio_target import by_parameters, out_of_reach
from pliant.prune.settings import OrderedPruner, Pruner
from pliant.prune.unit_order import ordered
from pliant.prune.width_cuts import cut_until, narrowed, widths
from pliant.searches.greedy import Move, check_loss
from pliant.step import Job
from pliant.step_setting import setting

Cuts = list[tuple[str, int]]

STATE_STAYS = 0.5
"""Share of a state that always stays. The estimates of its units are added up as if they were independent, and the
fewer units remain, the more the loss exceeds this sum."""


class FisherPruner(OrderedPruner, Pruner):
    """Narrow MLPs and attentions where the loss depends on them least, without a search: the Fisher information of
    every channel and head is computed once (Kwon et al., "A Fast Post-Training Pruning Framework for Transformers",
    2022), and the groups with the smallest loss increase for what they save are removed from all layers. Within a layer
    units are removed in ``order``. Takes a few passes over the text."""

    group: int = setting(
        "Every remaining width is a multiple of so many elements; heads are removed one key-value group at a time.",
        default=32,
        at_least=1,
    )

    per: str = setting(
        "Cost by which the loss increase is divided: parameters, macs, bytes (that decoding reads), or prefill or "
        "decode (milliseconds, measured on this machine first).",
        default="parameters",
        choices=COSTS,
    )

    order: str = "activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.key != "perplexity":
            raise StepError("metric must be perplexity here: at the dense model the divergence from it has no gradient")

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        allowed = self._widths(anatomy)
        self._reaching([(axis, units) for axis, narrower in allowed.items() for units in narrower], anatomy)
        windows = self.windows(job, self.samples, self.seed)
        with ordered(job, anatomy, self.order, windows):
            with job.progress.stage("fisher information"):
                increases = loss_increases(job.model, anatomy, windows, job.progress)
            for of_units in increases.values():
                check_loss(of_units.sum().item())
            subnet = self._reaching(self._cuts(allowed, increases, pruning.cost(self.per)), anatomy)
            steps = {name: [anatomy.axes[name].size, *narrower] for name, narrower in allowed.items()}
            subnet = settled(by_parameters(anatomy), anatomy, subnet, self.ratio, steps)
            pruning.commit("fisher information", Move("all", subnet), None)
            self.finish(pruning, job, step_moves([anatomy.axes[name] for name in increases], self.group))

    def _widths(self, anatomy: Anatomy) -> dict[str, list[int]]:
        """Axis that is measured on text -> the widths that it may be cut to, widest first."""
        states = {axis.name for block in anatomy.blocks.values() if (axis := block.state_axis) is not None}
        return {
            axis.name: widths(axis, self.group, ceil(STATE_STAYS * axis.size) if axis.name in states else 0)
            for axis in measured_axes(anatomy)
        }

    def _cuts(self, allowed: Mapping[str, list[int]], increases: Mapping[str, torch.Tensor], cost: Cost) -> Cuts:
        """All cuts; those with the smallest loss increase for what they save come first."""
        whole = cost(Subnet())
        ranked = []
        for name, of_units in increases.items():
            before, width, rank = whole, of_units.shape[-1], 0.0
            for units in allowed[name]:
                after = cost(narrowed([(name, units)]))
                # a group cannot be removed before those behind it, even if it increases the loss less than they do
                rank = max(rank, of_units[..., units:width].sum().item() / max(1e-9, before - after))
                ranked.append((rank, name, -units))
                before, width = after, units
        return [(name, -units) for _, name, units in sorted(ranked)]

    def _reaching(self, cuts: Cuts, anatomy: Anatomy) -> Subnet:
        """The sub-network after the first cuts that reach the ratio."""
        subnet = cut_until(cuts, lambda subnet: ratio(anatomy, subnet), self.ratio)
        if subnet is None:
            raise out_of_reach(self.ratio, ratio(anatomy, narrowed(cuts)), "narrowing every axis to its smallest width")
        return subnet
