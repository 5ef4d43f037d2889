"""Packed matrices: the weight of a linear layer in bf16, int8 or int4, dense or sparse, as one tensor of bytes.

``native/format.h`` says what lies where. The same bytes are written and read here in plain PyTorch where there are no kernels.
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
    """What the first bytes of a packed matrix say.

    Attributes:
        format: bf16, int8 or int4.
        sparse: whether zeros are left out, with a bit for every weight.
        group: inputs that share a scale in int4; 0 in others.
        rows: outputs of the layer.
        columns: inputs of the layer.
        stored: weights that are stored.
        size: bytes of everything.
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
        """Bits that a weight takes, scales and masks included."""
        return 8 * self.size / (self.rows * self.columns)


def header(packed: torch.Tensor) -> Header:
    """Read the header of a packed matrix.

    Arguments:
        packed: shape ``(bytes,)``, uint8.

    Raises:
        PackedError: it is none.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < SIZE:
        raise PackedError(f"a packed matrix is a tensor of bytes, not {tuple(packed.shape)} of {packed.dtype}")
    raw = RawHeader.read(bytes(packed[:SIZE].tolist()))
    if raw.magic != MAGIC or raw.format >= len(FORMATS):
        raise PackedError("this tensor is not a packed matrix: its first bytes are different")
    return Header(FORMATS[raw.format], bool(raw.sparse), raw.group, raw.rows, raw.columns, raw.stored, raw.size)


def room(size: int) -> torch.Tensor:
    """``size`` bytes, not initialised; in huge pages where the system has them."""
    native = library()
    if native is None:
        return torch.empty(size, dtype=torch.uint8)
    address = native.pliant_allocate(size)
    if not address:
        raise MemoryError(f"no room for {size} bytes")
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, native.pliant_free, address)  # the tensor holds on to it
    return torch.frombuffer(memory, dtype=torch.uint8)


def pack(
    weight: torch.Tensor, format: str, *, sparse: bool = False, group: int = 128, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The packed form of a weight.

    Arguments:
        weight: shape ``(out_features, in_features)``.
        format: bf16 (rounded to nearest), int8 (a scale for every output) or int4 (a bf16 scale for every output
            and group of inputs, chosen to leave the least squared error).
        sparse: leave zeros out.
        group: inputs that share a scale in int4: 32, 64 or 128.
        scales: what int8 or int4 codes are multiples of, shape ``(out_features,)`` or ``(out_features, groups)``; for weights
            that lie on a grid already it is found again without.

    Returns:
        Shape ``(bytes,)``, uint8.

    Raises:
        PackedError: no such format, or a weight that is no matrix.
        WeightError: weights that are not finite.
    """
    if format not in FORMATS:
        raise PackedError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    if group not in GROUPS:
        raise PackedError(f"a group has {', '.join(map(str, GROUPS))} inputs, not {group!r}")
    if weight.dim() != 2 or not weight.numel():
        raise PackedError(f"a matrix is packed, not a tensor of shape {tuple(weight.shape)}")
    dense = weight.detach().to("cpu", torch.float32).contiguous()
    if not all(
        map(math.isfinite, torch.stack(dense.aminmax()).tolist())
    ):  # NaN is both; isfinite takes as long as packing
        raise WeightError("a weight is not a finite number; nothing was packed")
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
    """The weight that a packed matrix stands for, exactly.

    Returns:
        Shape ``(out_features, in_features)``, float32.
    """
    found = header(packed)
    native = library()
    if native is None:
        return reference.unpack(packed)
    packed = packed.contiguous()
    dense = torch.empty(found.rows, found.columns, dtype=torch.float32)
    check(native.pliant_unpack(packed.data_ptr(), packed.numel(), dense.data_ptr(), threads()))
    return dense


def verify(packed: torch.Tensor) -> None:
    """Look at every part of a packed matrix: its header, its masks, its checksum.

    Raises:
        PackedError: it is damaged, cut short, or none.
    """
    header(packed)
    packed = packed.contiguous()
    native = library()
    if native is None:
        wrong = reference.verify(packed)
        if wrong:
            raise PackedError(f"a packed matrix cannot be used: {wrong}")
        return
    check(native.pliant_verify(packed.data_ptr(), packed.numel(), threads()))


def check(failed: int) -> None:
    """Raise what a native call had to say.

    Raises:
        PackedError: if it failed.
    """
    if failed:
        native: Any = library()
        raise PackedError(f"a packed matrix cannot be used: {native.pliant_message().decode()}")
