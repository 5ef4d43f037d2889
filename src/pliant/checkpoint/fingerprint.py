"""Read all weights of a model, to check that they are finite and to identify the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pliant.digest import digest
from pliant.errors import WeightError
from pliant.pages import within_limit

SAMPLE = 4096  # elements of each tensor in a fingerprint


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Raise if a weight is not finite.

    Raises:
        WeightError: a tensor holds NaN or infinity; the message names the first one.
    """
    for name, parameter in within_limit(model, model.named_parameters()):
        if parameter.is_floating_point() and parameter.element_size() == 1:
            parameter = parameter.float()  # torch computes nothing in 8-bit floats
        if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise WeightError(f"{name} holds {bad} value(s) that are not finite; give an undamaged copy of the model")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of every tensor's name, shape, dtype and up to 4096 evenly spaced elements."""
    return digest(_samples(model))


def _samples(model: nn.Module) -> Iterator[str | bytes]:
    for name, tensor in within_limit(model, model.state_dict().items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // SAMPLE)
        yield flat[::step].float().cpu().numpy().tobytes()
