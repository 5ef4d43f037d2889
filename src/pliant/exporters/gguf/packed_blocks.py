"""Weights that are packed already, as blocks of GGUF: the same codes, so that no weight is rounded a second time."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Q

from pliant.errors import ArtefactError
from pliant.exporters.gguf.plan import Tensor, stored_of
from pliant.runtime.packed_linear import Packed
from pliant.runtime.reference import codes

BLOCK = 32  # weights with one scale
_ALIKE = {Q.Q4_0: "int4", Q.Q8_0: "int8"}  # type of a file -> the packed format with the same codes


def alike(model: Any, tensor: Tensor, kind: Q) -> bool:
    """Whether all parts of a tensor are packed with the codes of this type."""
    layers = [stored_of(model, part.source) for part in tensor.parts]
    return (
        bool(layers)
        and tensor.change is None
        and kind in _ALIKE
        and all(
            isinstance(layer, Packed)
            and layer.header().format == _ALIKE[kind]
            and (layer.header().group or BLOCK) % BLOCK == 0
            for layer in layers
        )
    )


def blocks(model: Any, tensor: Tensor, kind: Q) -> tuple[np.ndarray, int]:
    """The bytes of a tensor, and how many of its scales float16 rounds.

    Raises:
        ArtefactError: a scale is too large for float16.
    """
    encoded, rounded = [], 0
    for part in tensor.parts:
        layer = stored_of(model, part.source)
        assert isinstance(layer, Packed)
        values, scales = codes(layer.packed)
        assert scales is not None
        if part.order is not None:
            values, scales = values[part.order], scales[part.order]
        rows, columns = values.shape
        width = layer.header().group or columns
        scales = (scales * part.factor).repeat_interleave(width // BLOCK, 1)[:, : columns // BLOCK]
        halves = scales.half()
        if not halves.isfinite().all():
            raise ArtefactError(f"{tensor.name} has a scale that float16 cannot hold; export the unpacked model")
        rounded += int((halves.float() != scales).sum())
        numbers = values.numpy().reshape(rows, columns // BLOCK, BLOCK)
        if kind == Q.Q4_0:  # one byte holds an element and that 16 after it
            unsigned = (numbers + 8).astype(np.uint8)
            numbers = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
        parts = (halves.numpy().view(np.uint8).reshape(rows, -1, 2), numbers.view(np.uint8))
        encoded.append(np.concatenate(parts, -1).reshape(rows, -1))
    return np.concatenate(encoded), rounded
