"""Narrow every axis of a model by the size of its weights: no data, no search."""

from __future__ import annotations

from math import ceil
from typing import ClassVar

import torch

from pliant.anatomy import Anatomy, Axis
from pliant.checkpoint.fingerprint import check_finite
from pliant.criteria import by_falling, l1_norms
from pliant.elastic import Subnet, check, described, macs, ratio, reorder
from pliant.errors import RatioError, StepError
from pliant.prune.known_subnet import cut_exactly
from pliant.prune.width_cuts import cut_until, narrowed, widths
from pliant.step import Job, Step, setting

ALLOCATIONS = ("uniform", "global")


class ChannelPruner(Step):
    """Cut the channels (of a Transformer also the heads) whose weights are smallest (Li et al., "Pruning Filters for
    Efficient ConvNets", 2017). It takes seconds and reads no data; what it costs in quality is for training to win back."""

    kind: ClassVar[str] = "channelpruner"
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
        "uniform takes the same share of every axis; global takes what is smallest against the mean of "
        "its axis, wherever.",
        default="uniform",
        choices=ALLOCATIONS,
    )

    group: int = setting(
        "Elements that come and go together, and what is left is a multiple of: most kernels like multiples of 8.",
        default=8,
        at_least=1,
    )

    minimum: float = setting(
        "Share of every axis that stays, whatever its channels are worth.", default=0.1, at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.macs_ratio is None):
            raise StepError("give either ratio (of parameters) or macs_ratio (of multiply-accumulates), and not both")

    def run(self, job: Job) -> None:
        check_finite(job.model)
        anatomy = described(job.model)
        if anatomy.traced:  # nobody looked at it yet
            check(job.model, anatomy)
        norms = l1_norms(job.model, anatomy)
        subnet = self.choose(anatomy, norms)
        reorder(job.model, anatomy, by_falling(norms))
        cut_exactly(job.model, anatomy, subnet)
        job.record.update(
            ratio=ratio(anatomy, subnet), macs_ratio=_macs_ratio(anatomy, subnet), subnet=subnet.to_dict()
        )

    def choose(self, anatomy: Anatomy, norms: dict[str, torch.Tensor]) -> Subnet:
        """The first sub-network that reaches the ratio, when groups go one by one.

        Arguments:
            norms: axis name -> how much each unit matters, shape ``(units,)``.

        Raises:
            RatioError: with everything gone that may go it is not reached.
        """
        ranked = sorted(
            (cut for axis in anatomy.axes.values() for cut in self._cuts(axis, norms[axis.name])), key=_rank
        )
        cuts = [(axis, left) for _, axis, left in ranked]
        reached = ratio if self.macs_ratio is None else _macs_ratio
        target = self.ratio or self.macs_ratio or 0.0
        found = cut_until(cuts, lambda subnet: reached(anatomy, subnet), target)
        if found is None:
            most = reached(anatomy, narrowed(cuts))
            raise RatioError(
                f"ratio {target} cannot be reached: cutting all that may go comes to {most:.4f}; a smaller minimum or group "
                "lets more go"
            )
        return found

    def _cuts(self, axis: Axis, norm: torch.Tensor) -> list[tuple[float, str, int]]:
        """(when it is its turn, axis, units left after it) for every group that can go off the end of an axis."""
        relative = norm.sort(descending=True).values / norm.mean().clamp(min=torch.finfo(norm.dtype).tiny)
        cuts, kept, turn = [], axis.size, 0.0
        for left in widths(axis, self.group, ceil(self.minimum * axis.size)):
            turn = max(
                turn, 1 - left / axis.size if self.allocation == "uniform" else relative[left:kept].mean().item()
            )
            cuts.append((turn, axis.name, left))
            kept = left
        return cuts


def _rank(cut: tuple[float, str, int]) -> tuple[float, str, int]:
    turn, axis, left = cut
    return turn, axis, -left  # groups of one axis go from its end


def _macs_ratio(anatomy: Anatomy, subnet: Subnet) -> float:
    return 1 - macs(anatomy, subnet) / macs(anatomy)
