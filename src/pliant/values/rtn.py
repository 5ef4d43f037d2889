"""Round weights to nearest, on a grid of few bits."""

from __future__ import annotations

from typing import ClassVar

import torch

from pliant.runtime.rounding_grid import round_to_grid
from pliant.step import Job, setting
from pliant.values.matrix import ValueStep, concerned, left_note, left_over


class RTN(ValueStep):
    """Round every matrix to nearest on a symmetric grid of few bits. Needs no data.

    The weights stay floating-point numbers that lie on the grid: any tool opens the model. ``PackedLinear`` finds a grid of
    8 bits a row or 4 bits a group of 128 again, and stores what is on it without another error.
    """

    kind: ClassVar[str] = "rtn"

    bits: int = setting("Bits of a weight, from 2 to 8.", default=4, at_least=2, at_most=8)

    group: int | None = setting(
        "Inputs that share a scale; none for one scale for every output.", default=128, at_least=1
    )

    @torch.no_grad()
    def run(self, job: Job) -> None:
        found = concerned(job.model, self.target_modules, self.exclude_modules)
        error = size = 0.0
        for matrix in found.each(job.model):
            flat = matrix.weight.flatten(0, -2)
            rounded = round_to_grid(flat.float(), self.bits, self.group)
            error += float((rounded - flat.float()).square().sum())
            size += float(flat.float().square().sum())
            matrix.weight.copy_(rounded.view(matrix.weight.shape))
        total = sum(matrix.weight.numel() for matrix in found.matrices)
        left = left_over(job.model, found, total)
        job.record.update(relative_error=(error / size) ** 0.5 if size else 0.0, left=left)
        job.show(*left_note(left))
