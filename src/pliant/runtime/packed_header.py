"""The header of a packed matrix, its first 128 bytes. ``native/format.h`` declares it as well; a test compares the
two."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<8s4I8qQ32x")
SIZE = _LAYOUT.size
MAGIC = b"PLIANTW\n"
VERSION = 1


class RawHeader(NamedTuple):
    """The fields in order. ``scales``, ``offsets``, ``masks`` and ``values`` are the positions of these parts in bytes.

    Attributes:
        format: 0 bf16, 1 int8, 2 int4.
        sparse: 1 if zeros are left out.
        group: inputs that share a scale in int4; 0 in other formats.
        rows: outputs of the layer.
        columns: inputs of the layer.
        stored: number of stored weights.
        size: bytes in total.
        checksum: of all words of 8 bytes, counting itself as 0.
    """

    magic: bytes
    version: int
    format: int
    sparse: int
    group: int
    rows: int
    columns: int
    stored: int
    scales: int
    offsets: int
    masks: int
    values: int
    size: int
    checksum: int

    @classmethod
    def read(cls, data: bytes) -> RawHeader:
        """The header in the first ``SIZE`` bytes of a packed matrix."""
        return cls._make(_LAYOUT.unpack(data[:SIZE]))

    def to_bytes(self) -> bytes:
        """The ``SIZE`` bytes of this header."""
        return _LAYOUT.pack(*self)
