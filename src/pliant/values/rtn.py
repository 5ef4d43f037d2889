"""Round weights to nearest, on a grid of few bits."""

from __future__ import annotations

import torch

from pliant.runtime.rounding_grid import round_to_grid
from pliant.step import Job
from pliant.step_setting import setting
from pliant.values.matrix import ValueStep, select_matrices, show_skipped


class RTN(ValueStep):
    """Round every matrix to nearest on a symmetric grid of few bits. Needs no data.

    The weights stay floating-point numbers, which lie on the grid, so any tool opens the model. ``PackedLinear``
    recognises a grid of 8 bits with a scale per row, or of 4 bits with groups of 128, 64 or 32, and stores such weights
    without another error.
    """

    bits: int = setting("Bits of a weight, from 2 to 8.", default=4, at_least=2, at_most=8)

    group: int | None = setting("Inputs that share a scale; none for one scale per output.", default=128, at_least=1)

    @torch.no_grad()
    def run(self, job: Job) -> None:
        found = select_matrices(job.model, self.target_modules, self.exclude_modules)
        error = size = 0.0
        with found.changing(job.model) as matrices:
            for matrix in matrices:
                flat = matrix.weight.flatten(0, -2).float()
                rounded = round_to_grid(flat, self.bits, self.group)
                error += float((rounded - flat).square().sum())
                size += float(flat.square().sum())
                matrix.weight.copy_(rounded.view(matrix.weight.shape))
        job.record.update(relative_error=(error / size) ** 0.5 if size else 0.0)
        show_skipped(job, found, sum(matrix.weight.numel() for matrix in found.matrices))
