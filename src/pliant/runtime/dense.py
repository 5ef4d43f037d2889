"""Recognise linear layers of torch and transformers, read their weights, and say why one cannot be changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from pliant.torch_private import has_state_hooks

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN: tuple[type, ...] = (nn.Parameter,)
"""Types of weights that hold their values as numbers."""


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is torch's ``Linear``, a class derived from it, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D)


def stored_in_out(module: nn.Module | None) -> bool:
    """Whether a linear layer stores its weight as ``(in_features, out_features)``."""
    return isinstance(module, Conv1D)


def size_names(layer: nn.Module) -> tuple[str, str]:
    """The attributes of a linear layer that hold its ``(out_features, in_features)``."""
    return ("nf", "nx") if stored_in_out(layer) else ("out_features", "in_features")


def weight_of(layer: Any) -> torch.Tensor:
    """A view of a linear layer's weight, detached, shape ``(out_features, in_features)``."""
    weight = layer.weight.detach()
    return weight.T if stored_in_out(layer) else weight


def sizes_of(layer: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer."""
    out_features, in_features = size_names(layer)
    return getattr(layer, out_features), getattr(layer, in_features)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's own parameter of a name; None if the attribute is missing or computed."""
    return dict(module.named_parameters(recurse=False)).get(name)


def why_fixed(layer: nn.Module) -> str:
    """Why a linear layer's weight cannot be changed in place; an empty string if it can."""
    if not is_linear(layer):
        return f"{type(layer).__name__} stores its weight in a form of its own"
    weight = own_parameter(layer, "weight")
    if weight is None:
        return "its weight is recomputed at each pass (a parametrization or a pruning mask); make that permanent first"
    if type(weight) not in PLAIN:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.dtype not in FLOATS:
        return f"its weight is stored as {str(weight.dtype).removeprefix('torch.')}"
    return "" if weight.numel() else "it has no weights"


def why_kept(layer: Any) -> str:
    """Why a linear layer cannot be replaced by an equivalent one; an empty string if it can."""
    if why := why_fixed(layer):
        return why
    if not _is_product(layer):
        return f"its forward computes something other than a linear layer ({type(layer).__name__})"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "the attention around it reads its weight and never calls it"
    if has_state_hooks(layer):
        return "it has hooks that change its state when it is saved or loaded"
    return ""


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether a layer computes exactly ``x W^T + bias``.

    A derived class with its own ``forward`` is tested on three random rows; one with other parameters, buffers or
    children is not accepted, because its output may depend on them.
    """
    if "forward" in vars(layer):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    held = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    if held - {"weight", "bias"} or list(layer.children()):
        return False
    weight = weight_of(layer)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(weight)
    try:
        output = layer.forward(x)
    except Exception:  # a forward with another signature can raise anything
        return False
    expected = F.linear(x, weight, layer.bias)
    return isinstance(output, torch.Tensor) and torch.allclose(
        output, expected, rtol=1e-2, atol=1e-3 * float(weight.abs().max())
    )
