"""The plan of a GGUF file: its metadata, and where the values of every tensor come from. No weight is read yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pliant.runtime.packed_linear import Packed

CHUNK = 2**24  # elements of a tensor that are read and rounded at once


class Unfit(Exception):  # noqa: N818
    """A container cannot carry this model; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Rows of one parameter of the model, or all of it.

    Attributes:
        source: full name of the parameter.
        order: the rows, in the order in which the file holds them; None for all as they are.
        dim: the dimension that rows run along: 0, or 1 for stacked experts of shape ``(experts, rows, columns)``.
        factor: all values are multiplied by it.
    """

    source: str
    order: torch.Tensor | None = None
    dim: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: its name in the file.
        shape: as in PyTorch, which is reversed in the file.
        parts: rows of the model, one part after another along the first dimension; none for zeros.
        change: what is done to the values of the joined parts; None for nothing.
        plain: it is float32 in files of every type.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Rows, ...] = ()
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    plain: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Plan:
    """One file.

    Attributes:
        architecture: the ``general.architecture`` that the reader takes.
        metadata: key -> value; a key that begins with a dot belongs to the architecture. Whole numbers are stored as
            uint32, other numbers as float32, numbers and arrays of NumPy by their dtype.
        notes: sentences on what the file holds beside the model's own weights, or rounds.
    """

    architecture: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def key(self, name: str) -> str:
        """The full name of a key."""
        return f"{self.architecture}{name}" if name.startswith(".") else name


def chunks(model: Any, tensor: Tensor) -> Iterator[torch.Tensor]:
    """The values of a tensor, float32, as consecutive slices of its first dimension."""
    if not tensor.parts:
        zeros = torch.zeros(tensor.shape)
        yield zeros if tensor.change is None else tensor.change(zeros)
    elif tensor.change is not None:
        yield tensor.change(torch.cat([values for part in tensor.parts for values in _read(model, part)]))
    else:
        for part in tensor.parts:
            yield from _read(model, part)


def _read(model: Any, part: Rows) -> Iterator[torch.Tensor]:
    """The values of a part, as consecutive slices of its first dimension."""
    stored = stored_of(model, part.source)
    if isinstance(stored, Packed):
        stored = stored.dense().weight
    stored = stored.detach()
    order = part.order
    rows = torch.arange(len(stored)) if order is None or part.dim else order
    for chosen in rows.split(max(1, CHUNK // max(1, stored[0].numel()))):
        values = stored.index_select(0, chosen)
        if order is not None and part.dim:
            values = values.index_select(part.dim, order)
        yield values.float() * part.factor if part.factor != 1 else values.float()


def stored_of(model: Any, name: str) -> torch.Tensor | Packed:
    """A parameter or buffer by its full name; for the weight of a packed layer, the layer."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    return module if isinstance(module, Packed) and last == "weight" else getattr(module, last)
