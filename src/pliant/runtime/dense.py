"""Linear layers as torch and transformers have them: which modules are such, their weights, and what stands against a change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
PLAIN: tuple[type, ...] = (nn.Parameter,)
"""Types of weights that hold their values as numbers."""


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is torch's ``Linear``, a class derived from it, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_of(layer: Any) -> torch.Tensor:
    """The weight of a linear layer, detached, shape ``(out_features, in_features)``."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def sizes_of(layer: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a module itself holds under a name, if it is one and not computed."""
    return dict(module.named_parameters(recurse=False)).get(name)


def why_fixed(layer: nn.Module) -> str:
    """Why the values of a linear layer's weight cannot be changed where they are; nothing where they can."""
    if not is_linear(layer):
        return f"{type(layer).__name__} keeps its weight in a form of its own"
    weight = own_parameter(layer, "weight")
    if weight is None:
        return (
            "its weight is computed anew at each pass (a parametrization or a pruning mask); make that permanent first"
        )
    if type(weight) not in PLAIN:
        return f"its weight is a {type(weight).__name__}, no plain tensor"
    if weight.dtype not in FLOATS:
        return f"its weight is stored as {str(weight.dtype).removeprefix('torch.')}"
    return "" if weight.numel() else "it has no weights"


def why_kept(layer: Any) -> str:
    """Why a linear layer cannot be replaced by another that computes the same; nothing where it can."""
    if why := why_fixed(layer):
        return why
    if not _is_product(layer):
        return f"it computes in a way of its own ({type(layer).__name__})"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "the attention around it reads its weight and never calls it"
    if any(vars(layer).get(hooks) for hooks in _STATE_HOOKS):
        return "hooks change its state as it is saved or loaded"
    return ""


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether ``x W^T + bias`` is all that a layer computes. A derived class with a ``forward`` of its own is tried on a few rows;
    one that holds more than a weight and a bias may do more tomorrow.
    """
    if "forward" in vars(layer):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    held = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    if held - {"weight", "bias"} or list(layer.children()):
        return False
    weight = weight_of(layer)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        found = layer.forward(x)
    except Exception:  # whatever a forward raises that takes something else than rows
        return False
    expected = F.linear(x, weight, layer.bias)
    return isinstance(found, torch.Tensor) and torch.allclose(
        found, expected, rtol=1e-2, atol=1e-3 * float(weight.abs().max())
    )
