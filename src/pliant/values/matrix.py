"""The weight matrices of a model's blocks, as its anatomy lists them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pliant.anatomy import layers_of
from pliant.elastic import described
from pliant.pages import hold


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or a stack of them.

    Attributes:
        name: what holds it, e.g. ``model.layers.3.mlp.up_proj``.
        weight: a view of its values with inputs last, shape ``(out, in)`` or ``(experts, out, in)``.
    """

    name: str
    weight: torch.Tensor


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Every weight matrix in the blocks of a model; embeddings and the output head are not among them.

    Raises:
        ArchitectureError: a layout that is not understood.
    """
    anatomy = described(model)
    layers = layers_of(model, anatomy.architecture)
    names = {id(module): name for name, module in model.named_modules()}
    for block in anatomy.blocks.values():
        for weight in block.weights:
            if weight.reads is None:
                continue
            layer = layers[block.layer]
            prefix = names[id(layer)]
            name = f"{prefix}.{weight.path}" if prefix else weight.path
            yield Matrix(name.removesuffix(".weight"), weight.tensor(layer).detach().movedim(weight.reads, -1))
            hold(model)


def head_of(model: Any) -> tuple[str, nn.Module] | None:
    """The output head of a language model and its name, if it has one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next(((name, module) for name, module in model.named_modules() if module is head), None) if head else None
