"""Latency table: measured milliseconds of the blocks of a model on this machine, by kind and width."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from pliant.anatomy import Anatomy, Block, evaluating
from pliant.device import wait
from pliant.elastic import Elastic, Subnet
from pliant.forward.windows import longest_of

NARROWED = (0.75, 0.5, 0.25)  # shares of an axis that are removed to time the rest
PHASES = ("prefill", "decode")
PROMPT = 256


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass, as the sum over its blocks.

    Attributes:
        phase: ``prefill`` (a prompt of 256 tokens, or of the model's positions if it has fewer) or ``decode`` (one
            token).
        rest: milliseconds outside the blocks: embeddings, output head, and layers without blocks.
        blocks: kind of block -> milliseconds of one of them at full width.
        axes: (kind, axis) -> (share of the axis kept, share of the block's milliseconds), ascending; values in between
            are interpolated.
    """

    phase: str
    rest: float
    blocks: Mapping[str, float]
    axes: Mapping[tuple[str, str], tuple[tuple[float, float], ...]]

    def of(self, anatomy: Anatomy, subnet: Subnet = Subnet()) -> float:
        """Milliseconds of the model under ``subnet``."""
        alive = (block for block in anatomy.blocks.values() if block.name not in subnet.skip)
        return self.rest + sum(self._block(block, subnet.kept(block)) for block in alive)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-ready data."""
        axes = [{"kind": kind, "axis": axis, "points": points} for (kind, axis), points in self.axes.items()]
        return {"phase": self.phase, "rest": self.rest, "blocks": dict(self.blocks), "axes": axes}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Latency:
        """The inverse of :meth:`to_dict`."""
        axes = {(a["kind"], a["axis"]): tuple((x, y) for x, y in a["points"]) for a in raw["axes"]}
        return cls(raw["phase"], raw["rest"], dict(raw["blocks"]), axes)

    def _block(self, block: Block, kept: Mapping[str, int]) -> float:
        time_ = self.blocks[block.kind]
        for axis in block.leaders:
            if axis.size:
                time_ *= _between(self.axes[block.kind, axis.leader], kept[axis.leader] / axis.size)
        return time_


def _between(points: tuple[tuple[float, float], ...], share: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(points):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return points[-1][1]


def measure_latency(model: Any, anatomy: Anatomy, phase: str = "prefill", *, repeats: int = 5) -> Latency:
    """Time the model with many of its blocks of one kind removed or narrowed, in turn, and take the difference.

    Whole models are timed rather than single layers, so that weights come from memory as they do in use.

    Arguments:
        phase: ``prefill`` or ``decode``.
        repeats: number of rounds; every round times each sub-network once, and medians are used.
    """
    # of each kind a block that has units of every axis, if there is one
    alike = sorted(anatomy.blocks.values(), key=lambda block: all(axis.size for axis in block.leaders))
    kinds = {block.kind: block for block in alike}
    subnets: dict[tuple[str, ...], Subnet] = {("dense",): Subnet()}
    narrower: dict[tuple[str, ...], float] = {}
    for kind, block in kinds.items():
        removable = (block.name for block in anatomy.may_all_go() if block.kind == kind)
        subnets["without", kind] = Subnet().without(*removable)
        for axis in block.leaders:
            # an axis that may lose all its units is measured without them: a block whose scan is gone still takes time
            shares = (*NARROWED, 1.0) if axis.fewest == 0 else NARROWED
            fewer = {axis.less(axis.size, round(axis.size * share)) for share in shares}
            for units in sorted(units for units in fewer if units is not None and units < axis.size):
                name = ("narrow", kind, axis.leader, str(units))
                subnets[name] = _narrowed(anatomy, kind, axis.leader, units / axis.size)
                narrower[name] = units / axis.size
    tokens = min(PROMPT, longest_of(model)) if phase == "prefill" else 1
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    elastic = Elastic(model, anatomy)
    taken: dict[tuple[str, ...], list[float]] = {name: [] for name in subnets}
    with evaluating(model):
        try:
            for _ in range(repeats + 1):
                for name, subnet in subnets.items():
                    elastic.activate(subnet)
                    taken[name].append(_milliseconds(model, ids))
        finally:
            elastic.activate(Subnet())
    median = {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first round warms up
    dense = median["dense",]
    blocks, axes = {}, {}
    for kind, block in kinds.items():
        count = sum(other.kind == kind for other in anatomy.blocks.values())
        removed = max(1, len(subnets["without", kind].skip))
        whole = max(1e-6, (dense - median["without", kind]) / removed)
        blocks[kind] = whole
        for axis in block.leaders:
            points = [] if axis.fewest == 0 and axis.size else [(0.0, 0.0)]
            for name, share in narrower.items():
                if name[1:3] == (kind, axis.leader):
                    saved = (dense - median[name]) / count
                    least = points[-1][1] if points else 0.0
                    points.append((share, min(1.0, max(least, 1 - saved / whole))))
            axes[kind, axis.leader] = (*points, (1.0, 1.0))
    rest = max(0.0, dense - sum(blocks[block.kind] for block in anatomy.blocks.values()))
    return Latency(phase, rest, blocks, axes)


def _narrowed(anatomy: Anatomy, kind: str, leader: str, share: float) -> Subnet:
    subnet = Subnet()
    for block in anatomy.blocks.values():
        for axis in block.leaders:
            if block.kind == kind and axis.leader == leader:
                units = round(axis.size * share)
                if axis.allows(units):
                    subnet = subnet.keeping(axis.name, units)
    return subnet


@torch.inference_mode()
def _milliseconds(model: Any, ids: torch.Tensor) -> float:
    wait(model.device)
    began = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    wait(model.device)
    return (time.perf_counter() - began) * 1e3
