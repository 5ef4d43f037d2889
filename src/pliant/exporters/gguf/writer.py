"""Write a planned GGUF file, one tensor after another, so that no more than a part of one is in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

from pliant.errors import ArtefactError
from pliant.exporters.gguf.plan import Plan, Tensor, chunks
from pliant.exporters.gguf.types import TYPES, bytes_of, type_of

ALIGNMENT = 32


def write(path: Path, plan: Plan, model: Any, kind: str) -> dict[str, int]:
    """Write a file, and return how many tensors have each type.

    Arguments:
        kind: one of ``TYPES``.

    Raises:
        ArtefactError: a value cannot be stored in this type.
    """
    tied = all(tensor.name != "output.weight" for tensor in plan.tensors)
    types = {tensor.name: type_of(tensor, TYPES[kind], tied) for tensor in plan.tensors}
    writer = GGUFWriter(None, plan.architecture)  # pyright: ignore[reportArgumentType]
    _add(writer, {plan.key(name): value for name, value in plan.metadata.items()})
    writer.add_file_type(TYPES[kind].number)
    writer.add_quantization_version(2)
    for tensor in plan.tensors:
        of = types[tensor.name]
        shape = bytes_of(tensor.shape, of)
        quantised = GGML_QUANT_SIZES[of][0] > 1
        writer.add_tensor_info(
            tensor.name,
            shape if quantised else tensor.shape,
            np.dtype(np.uint8 if quantised else np.float32),
            math.prod(shape),
            raw_dtype=of,
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        out.write(bytes(-out.tell() % ALIGNMENT))
        for tensor in plan.tensors:
            written = 0
            for values in chunks(model, tensor):
                written += out.write(encoded(tensor, values, types[tensor.name]).data)
            expected = math.prod(bytes_of(tensor.shape, types[tensor.name]))
            if written != expected:
                raise AssertionError(f"{tensor.name}: {written} bytes were written in place of {expected}")
            out.write(bytes(-written % ALIGNMENT))
    finally:
        writer.close()
    return {of.name: list(types.values()).count(of) for of in dict.fromkeys(types.values())}


def encoded(tensor: Tensor, values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Values as the file stores them.

    Raises:
        ArtefactError: a value is not finite, or too large for the type.
    """
    array = values.contiguous().numpy()
    with np.errstate(over="ignore"):
        stored = array if kind == GGMLQuantizationType.F32 else quants.quantize(array, kind)
    if not np.isfinite(stored if stored.dtype.kind == "f" else array).all():
        raise ArtefactError(f"{tensor.name} has values that {kind.name} cannot hold; write another --type")
    return np.ascontiguousarray(stored)


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
