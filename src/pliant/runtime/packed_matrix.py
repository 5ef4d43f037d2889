"""Packed matrices: the weight of a linear layer in bf16, int8 or int4, dense or sparse, as one tensor of bytes.

``native/format.h`` defines the layout. Without kernels, ``reference.py`` reads and writes the same bytes in plain
PyTorch.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from pliant.errors import PackedError, WeightError
from pliant.runtime import reference
from pliant.runtime.library import library
from pliant.runtime.packed_header import MAGIC, SIZE, RawHeader
from pliant.runtime.threads import threads

METHOD = "pliant"
"""Name of packed layers in transformers' registry of quantisation methods."""
FORMATS = ("bf16", "int8", "int4")
GROUPS = (32, 64, 128)
"""Inputs that may share a scale in int4."""


@dataclass(frozen=True)
class Header:
    """The header of a packed matrix.

    Attributes:
        format: bf16, int8 or int4.
        sparse: whether zeros are left out, with a bit for every weight.
        group: inputs that share a scale in int4; 0 in other formats.
        rows: outputs of the layer.
        columns: inputs of the layer.
        stored: number of stored weights.
        size: bytes in total.
    """

    format: str
    sparse: bool
    group: int
    rows: int
    columns: int
    stored: int
    size: int

    @property
    def bits(self) -> float:
        """Bits per weight, including scales and masks."""
        return 8 * self.size / (self.rows * self.columns)


def header(packed: torch.Tensor) -> Header:
    """Read the header of a packed matrix.

    Arguments:
        packed: shape ``(bytes,)``, uint8.

    Raises:
        PackedError: it is not a packed matrix.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < SIZE:
        raise PackedError(
            f"not a packed matrix: it must be a tensor of at least {SIZE} bytes (uint8) in one dimension, not of shape "
            f"{tuple(packed.shape)} and {packed.dtype}"
        )
    raw = RawHeader.read(bytes(packed[:SIZE].tolist()))
    if raw.magic != MAGIC or raw.format >= len(FORMATS):
        raise PackedError("not a packed matrix: bad magic bytes")
    return Header(FORMATS[raw.format], bool(raw.sparse), raw.group, raw.rows, raw.columns, raw.stored, raw.size)


def room(size: int) -> torch.Tensor:
    """Allocate ``size`` bytes, not initialised, in huge pages if the system has them."""
    native = library()
    if native is None:
        return torch.empty(size, dtype=torch.uint8)
    address = native.pliant_allocate(size)
    if not address:
        raise MemoryError(f"cannot allocate {size} bytes for a packed matrix")
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, native.pliant_free, address)  # the tensor keeps it alive
    return torch.frombuffer(memory, dtype=torch.uint8)


def pack(
    weight: torch.Tensor, format: str, *, sparse: bool = False, group: int = 128, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Pack a weight.

    Arguments:
        weight: shape ``(out_features, in_features)``.
        format: bf16 (rounded to nearest), int8 (a scale per output) or int4 (a bf16 scale per output and group of
            inputs, the one of seven candidates with the smallest squared error).
        sparse: leave zeros out.
        group: inputs that share a scale in int4: 32, 64 or 128.
        scales: scales of the int8 or int4 codes, shape ``(out_features,)`` or ``(out_features, groups)``. They can be
            left out for weights that lie on a grid already, because the same scales are found again.

    Returns:
        Shape ``(bytes,)``, uint8.

    Raises:
        PackedError: the format or group is unknown, or the weight is not a matrix.
        WeightError: the weight is not finite.
    """
    if format not in FORMATS:
        raise PackedError(f"unknown format {format!r}; choose from: {', '.join(FORMATS)}")
    if group not in GROUPS:
        raise PackedError(f"group must be one of {', '.join(map(str, GROUPS))}; not {group!r}")
    if weight.dim() != 2 or not weight.numel():
        raise PackedError(f"only a matrix with elements can be packed, not a tensor of shape {tuple(weight.shape)}")
    dense = weight.detach().to("cpu", torch.float32).contiguous()
    extremes = torch.stack(dense.aminmax()).tolist()  # NaN becomes both; torch.isfinite takes as long as packing
    if not all(map(math.isfinite, extremes)):
        raise WeightError("the weight holds NaN or infinity, so it was not packed; give an undamaged copy of the model")
    if scales is not None:
        scales = scales.detach().to("cpu", torch.float32).contiguous()
    native = library()
    if native is None:
        return reference.pack(dense, FORMATS.index(format), sparse, group, scales)
    size, count = ctypes.c_int64(), threads()
    packing = native.pliant_pack(
        dense.data_ptr(),
        *dense.shape,
        FORMATS.index(format),
        sparse,
        group,
        None if scales is None else scales.data_ptr(),
        count,
        ctypes.byref(size),
    )
    try:
        packed = room(size.value)
        native.pliant_pack_write(packing, packed.data_ptr(), count)
    finally:
        native.pliant_pack_end(packing)
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack a matrix, exactly.

    Returns:
        Shape ``(out_features, in_features)``, float32.
    """
    size = header(packed)
    native = library()
    if native is None:
        return reference.unpack(packed)
    packed = packed.contiguous()
    dense = torch.empty(size.rows, size.columns, dtype=torch.float32)
    check(native.pliant_unpack(packed.data_ptr(), packed.numel(), dense.data_ptr(), threads()))
    return dense


def verify(packed: torch.Tensor) -> None:
    """Check every part of a packed matrix: its header, its masks, its checksum.

    Raises:
        PackedError: it is damaged, truncated, or not a packed matrix.
    """
    header(packed)
    packed = packed.contiguous()
    native = library()
    if native is None:
        fault = reference.verify(packed)
        if fault:
            raise PackedError(f"a packed matrix cannot be used: {fault}")
        return
    check(native.pliant_verify(packed.data_ptr(), packed.numel(), threads()))


def check(failed: int) -> None:
    """Raise the error of a native call.

    Raises:
        PackedError: the call failed.
    """
    if failed:
        native: Any = library()
        raise PackedError(f"a packed matrix cannot be used: {native.pliant_message().decode()}")
