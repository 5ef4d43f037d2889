"""Narrow the axes of a model by the size of their weights, without data or search."""

from __future__ import annotations

from math import ceil
from typing import ClassVar

import torch

from pliant.anatomy import Anatomy, Axis
from pliant.checkpoint.fingerprint import check_finite
from pliant.criteria import by_falling, l1_norms
from pliant.elastic import Subnet, check, described, macs, ratio, reorder
from pliant.errors import RatioError, StepError
from pliant.prune.known_subnet import extract_and_verify
from pliant.prune.ratio_target import out_of_reach
from pliant.prune.width_cuts import cut_until, narrowed, widths
from pliant.step import Job, Step
from pliant.step_setting import setting

ALLOCATIONS = ("uniform", "global")


class ChannelPruner(Step):
    """Cut the channels (of a Transformer also the heads) whose weights are smallest (Li et al., "Pruning Filters for
    Efficient ConvNets", 2017). It takes seconds and reads no data; training afterwards has to restore the quality."""

    family: ClassVar[str] = "pruner"

    ratio: float | None = setting(
        "Share of all parameters to remove. Give this or macs_ratio.", default=None, above=0, below=1, error=RatioError
    )

    macs_ratio: float | None = setting(
        "Share of all multiply-accumulates to remove, of one image or one token.",
        default=None,
        above=0,
        below=1,
        error=RatioError,
    )

    allocation: str = setting(
        "uniform removes the same share of every axis; global removes the units that are smallest relative to the "
        "mean of their axis.",
        default="uniform",
        choices=ALLOCATIONS,
    )

    group: int = setting(
        "Every remaining width is a multiple of so many elements; most kernels are fastest at multiples of 8.",
        default=8,
        at_least=1,
    )

    minimum: float = setting("Share of every axis that always stays.", default=0.1, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.macs_ratio is None):
            raise StepError("give either ratio (of parameters) or macs_ratio (of multiply-accumulates), and not both")

    def run(self, job: Job) -> None:
        check_finite(job.model)
        anatomy = described(job.model)
        if anatomy.traced:  # not checked yet
            check(job.model, anatomy)
        norms = l1_norms(job.model, anatomy)
        subnet = self.choose(anatomy, norms)
        reorder(job.model, anatomy, by_falling(norms, anatomy))
        extract_and_verify(job.model, anatomy, subnet)
        job.record.update(
            ratio=ratio(anatomy, subnet), macs_ratio=_macs_ratio(anatomy, subnet), subnet=subnet.to_dict()
        )

    def choose(self, anatomy: Anatomy, norms: dict[str, torch.Tensor]) -> Subnet:
        """The first sub-network that reaches the ratio when groups are removed one by one.

        Arguments:
            norms: axis name -> importance of each unit, shape ``axis.shape``.

        Raises:
            RatioError: the ratio is not reached with every axis at its minimum.
        """
        ranked = sorted(
            (cut for axis in anatomy.axes.values() for cut in self._cuts(axis, norms[axis.name])),
            key=lambda cut: (cut[0], cut[1], -cut[2]),  # groups of one axis are removed from its end
        )
        cuts = [(axis, units) for _, axis, units in ranked]
        name, removed = ("ratio", ratio) if self.macs_ratio is None else ("macs_ratio", _macs_ratio)
        target = self.ratio or self.macs_ratio or 0.0
        subnet = cut_until(cuts, lambda subnet: removed(anatomy, subnet), target)
        if subnet is None:
            most = removed(anatomy, narrowed(cuts))
            limits = f"minimum={self.minimum} and group={self.group}"
            raise out_of_reach(target, most, f"cutting everything that {limits} allow", name)
        return subnet

    def _cuts(self, axis: Axis, norm: torch.Tensor) -> list[tuple[float, str, int]]:
        """(rank, axis, units that remain) for every group that can be removed from the end of an axis."""
        relative = norm.sort(descending=True).values / norm.mean().clamp(min=torch.finfo(norm.dtype).tiny)
        cuts, before, rank = [], axis.size, 0.0
        for units in widths(axis, self.group, ceil(self.minimum * axis.size)):
            uniform = self.allocation == "uniform"
            rank = max(rank, 1 - units / axis.size if uniform else relative[..., units:before].mean().item())
            cuts.append((rank, axis.name, units))
            before = units
        return cuts


def _macs_ratio(anatomy: Anatomy, subnet: Subnet) -> float:
    return 1 - macs(anatomy, subnet) / macs(anatomy)
