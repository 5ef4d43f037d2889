"""Zero the smallest weights."""

from __future__ import annotations

import torch

from pliant.step import Job
from pliant.step_setting import setting
from pliant.values.matrix import ValueStep, select_matrices, show_skipped


class Magnitude(ValueStep):
    """Zero the smallest weights by absolute value in every matrix (Han et al. 2015). Needs no data.

    The simplest way to make a model sparse: most models do not bear a sparsity of a half without training afterwards.
    """

    sparsity: float = setting("Share of the weights to zero, from 0 to 1.", at_least=0, at_most=1)

    within: str = setting(
        "The weights that the share is taken of: matrix, or row (the weights of one output).",
        default="matrix",
        choices=("matrix", "row"),
    )

    @torch.no_grad()
    def run(self, job: Job) -> None:
        found = select_matrices(job.model, self.target_modules, self.exclude_modules)
        zeros = total = 0
        with found.changing(job.model) as matrices:
            for matrix in matrices:
                for one in matrix.weight if matrix.weight.dim() == 3 else (matrix.weight,):
                    zero_smallest(one, self.sparsity, within=self.within)
                zeros += int((matrix.weight == 0).sum())
                total += matrix.weight.numel()
        job.record.update(sparsity=zeros / total, weights=total)
        show_skipped(job, found, total)


def zero_smallest(weight: torch.Tensor, sparsity: float, *, within: str = "matrix") -> None:
    """Set the ``round(sparsity * n)`` smallest weights to zero, in place; of equal ones the first.

    Arguments:
        weight: shape ``(out, in)``.
        within: ``matrix`` or ``row``: n is its number of weights.
    """
    sizes = weight.abs().float()
    sizes = sizes.reshape(1, -1) if within == "matrix" else sizes
    count = round(sparsity * sizes.shape[1])
    smallest = torch.zeros_like(sizes, dtype=torch.bool)
    if count:
        border = sizes.kthvalue(count, dim=1, keepdim=True).values
        smallest = sizes < border
        left = count - smallest.sum(1, keepdim=True)
        level = sizes == border
        smallest |= level & (level.cumsum(1) <= left)
    weight.masked_fill_(smallest.view(weight.shape), 0)
