"""Write a planned GGUF file, one tensor after another, so that no more than a part of one is in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

from pliant.errors import ArtefactError
from pliant.exporters.gguf.packed_blocks import alike, blocks
from pliant.exporters.gguf.plan import Plan, Tensor, chunks
from pliant.exporters.gguf.types import TYPES, bytes_of, type_of
from pliant.pages import within_limit
from pliant.progress import Progress

ALIGNMENT = 32
WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)  # hold every float32, roughly


class Written(NamedTuple):
    """A file that was written.

    Attributes:
        types: name of a type -> number of tensors that have it.
        rounded: scales of packed weights that float16 rounds.
    """

    types: dict[str, int]
    rounded: int


def size_of(plan: Plan, kind: str) -> int:
    """Bytes of all tensors of a file."""
    return sum(-(-math.prod(bytes_of(t.shape, of)) // ALIGNMENT) * ALIGNMENT for t, of in _types(plan, kind))


def write(path: Path, plan: Plan, model: Any, kind: str, progress: Progress) -> Written:
    """Write a file.

    Arguments:
        kind: one of ``TYPES``.

    Raises:
        ArtefactError: a value cannot be stored in this type.
    """
    writer = GGUFWriter(None, plan.architecture)  # pyright: ignore[reportArgumentType]
    _add(writer, {plan.key(name): value for name, value in plan.metadata.items()})
    writer.add_file_type(TYPES[kind].number)
    writer.add_quantization_version(2)
    typed = _types(plan, kind)
    for tensor, of in typed:
        quantised = GGML_QUANT_SIZES[of][0] > 1
        shape = bytes_of(tensor.shape, of)
        dtype = np.dtype(np.uint8 if quantised else np.float32)
        writer.add_tensor_info(tensor.name, shape if quantised else tensor.shape, dtype, math.prod(shape), raw_dtype=of)
    rounded, done = 0, 0
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        out.write(bytes(-out.tell() % ALIGNMENT))
        total = size_of(plan, kind)
        for tensor, of in within_limit(model, typed):
            began = out.tell()
            if alike(model, tensor, of):
                stored, some = blocks(model, tensor, of)
                out.write(stored.data)
                rounded += some
            else:
                for values in chunks(model, tensor):
                    out.write(_encoded(tensor, values, of).data)
            written, expected = out.tell() - began, math.prod(bytes_of(tensor.shape, of))
            if written != expected:
                raise AssertionError(f"{tensor.name} took {written} bytes, not {expected}")
            out.write(bytes(-written % ALIGNMENT))
            done += written
            progress.step(done / total, tensor.name)
    finally:
        writer.close()
    names = [of.name for _, of in typed]
    return Written({name: names.count(name) for name in dict.fromkeys(names)}, rounded)


def _types(plan: Plan, kind: str) -> list[tuple[Tensor, GGMLQuantizationType]]:
    """Every tensor with its type."""
    tied = all(tensor.name != "output.weight" for tensor in plan.tensors)
    return [(tensor, type_of(tensor, TYPES[kind], tied)) for tensor in plan.tensors]


def _encoded(tensor: Tensor, values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Values as the file stores them.

    Raises:
        ArtefactError: a value is not finite, or too large for the type.
    """
    array = values.contiguous().numpy()
    largest = np.inf if kind in WIDE else np.finfo(np.float16).max  # scales are float16, too
    if not (np.isfinite(array).all() and np.abs(array).max(initial=0) <= largest):
        raise ArtefactError(f"{tensor.name} has values that {kind.name.lower()} cannot hold; choose another type")
    return array if kind == GGMLQuantizationType.F32 else np.ascontiguousarray(quants.quantize(array, kind))


def _add(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if isinstance(value, np.generic):
            writer.add_key_value(key, value.item(), GGUFValueType[value.dtype.name.upper()])
        elif isinstance(value, np.ndarray):
            kind = GGUFValueType[value.dtype.name.upper()]
            writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, sub_type=kind)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
