"""Count the packed layers of a model and their bytes."""

from __future__ import annotations

from collections import Counter

from torch import nn

from pliant.runtime.packed_linear import Packed


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of a model is packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def packed_formats(model: nn.Module) -> dict[str, int]:
    """The number of layers packed in each format."""
    return dict(Counter(module.header().format for module in model.modules() if isinstance(module, Packed)))


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed layers, each counted once: these are read for every token."""
    return sum({id(m.packed): m.packed.numel() for m in model.modules() if isinstance(m, Packed)}.values())


def unpacked_bytes(model: nn.Module, element: int) -> int:
    """Bytes that the weights of all packed layers would take with ``element`` bytes each."""
    layers = (module for module in model.modules() if isinstance(module, Packed))
    return sum(layer.in_features * layer.out_features * element for layer in layers)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model with packed layers holds and its folder stores."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
