"""Grids to which weights are rounded: whole multiples of a scale per output, or per output and group of inputs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# of the other candidates: steps in the largest weight, as a multiple of half the number of codes
SLACK = (1.0, 0.9375, 1.0625, 1.125, 1.1875, 1.25)
TINY = 1e-30


def scales_of(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """The scale of every row, or of every row and group, of a symmetric grid.

    With 8 bits the largest weight is 127 steps. With fewer bits the scale is a bf16 number, the one of seven candidates
    with the smallest squared error: some clip the largest weight, and a negative one makes use of the lowest code,
    which has no positive counterpart. Weights that lie on such a grid already get the same scale again.

    Arguments:
        weight: shape ``(out, in)``, float32.

    Returns:
        Shape ``(out, groups)``, float32; one group if ``group`` is None. 0 for a group of zeros.
    """
    width = group or weight.shape[1]
    groups = F.pad(weight, (0, -weight.shape[1] % width)).unflatten(1, (-1, width))
    low, high = groups.amin(2), groups.amax(2)
    largest, half = torch.maximum(-low, high), 2 ** (bits - 1)
    if bits == 8:
        return torch.where(largest > TINY, largest / (half - 1), 0)
    # the largest weight gets the lowest code, whatever its sign
    sign = torch.where(-low >= high, 1.0, -1.0).to(weight)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for scale in (largest / (half - 1), *(sign * largest / (half * slack) for slack in SLACK)):
        scale = scale.to(torch.bfloat16).float()
        inverse = torch.where(scale != 0, 1 / scale, 0)[..., None]
        off = groups - (groups * inverse).round().clamp(-half, half - 1) * scale[..., None]
        error = off.square().sum(2)
        better = (error < least) & (scale != 0) & (largest > TINY)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def codes_of(weight: torch.Tensor, scales: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """The nearest whole multiples, shape ``(out, in)``, float32."""
    wide = wide_scales(scales, weight.shape[1], group)
    low = 1 - 2 ** (bits - 1) if bits == 8 else -(2 ** (bits - 1))
    return (weight * torch.where(wide != 0, 1 / wide, 0)).round().clamp(low, 2 ** (bits - 1) - 1)


def wide_scales(scales: torch.Tensor, columns: int, group: int | None) -> torch.Tensor:
    """The scales of groups, repeated for every weight; scales of rows are returned as they are."""
    return scales if group is None else scales.repeat_interleave(group, 1)[:, :columns]


def round_to_grid(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Weights rounded to the nearest points of their grid, shape ``(out, in)``, float32."""
    scales = scales_of(weight, bits, group)
    return codes_of(weight, scales, bits, group) * wide_scales(scales, weight.shape[1], group)
