"""The header of a packed matrix: the first 128 bytes, as ``native/format.h`` declares them too. A test compares the two."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<8s4I8qQ32x")
SIZE = _LAYOUT.size
MAGIC = b"PLIANTW\n"
VERSION = 1


class RawHeader(NamedTuple):
    """The fields in their order. ``scales``, ``offsets``, ``masks`` and ``values`` are where these parts begin, in bytes.

    Attributes:
        format: 0 bf16, 1 int8, 2 int4.
        sparse: 1 where zeros are left out.
        group: inputs that share a scale in int4; 0 in others.
        rows: outputs of the layer.
        columns: inputs of the layer.
        stored: weights that are stored.
        size: bytes of everything.
        checksum: of all words of 8 bytes, with this one as 0.
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
