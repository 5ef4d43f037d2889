"""Keys and values of one layer in blocks of 64 tokens that grow, the older blocks packed."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pliant.errors import PackedError
from pliant.runtime.library import library
from pliant.runtime.packed_matrix import FORMATS
from pliant.runtime.threads import threads

BLOCK = 64


class _Keeping(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("key_sparsity", ctypes.c_float),
        ("value_sparsity", ctypes.c_float),
        ("recent", ctypes.c_int64),
        ("first", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How a cache keeps its tokens.

    Attributes:
        format: format of older blocks: bf16, int8, or float32 to pack none.
        key_sparsity: share of each block's keys that is zeroed when the block is packed: the smallest ones of each
            head, after rotary positions are applied.
        value_sparsity: the same for values.
        recent: number of tokens at the end that stay float32.
        first: number of tokens at the beginning in which nothing is zeroed.
    """

    format: str = "bf16"
    key_sparsity: float = 0.0
    value_sparsity: float = 0.0
    recent: int = 64
    first: int = 4

    def __post_init__(self) -> None:
        if self.format not in ("float32", "bf16", "int8"):
            raise PackedError(f"format must be one of float32, bf16, int8; not {self.format!r}")
        for name, share in (("key_sparsity", self.key_sparsity), ("value_sparsity", self.value_sparsity)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise PackedError(f"{name} must be a number of at least 0 and below 1; not {share!r}")
            if share and self.format == "float32":
                raise PackedError(f"{name} needs packed blocks: format bf16 or int8")
        for name, tokens in (("recent", self.recent), ("first", self.first)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens < 2**63:
                raise PackedError(f"{name} must be a whole number of tokens, at least 0; not {tokens!r}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Keeping:
        """Build from settings by name.

        Raises:
            PackedError: a setting is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - {*known}):
            raise PackedError(f"unknown cache setting {unknown[0]!r}; choose from: {', '.join(known)}")
        return cls(**settings)

    def native(self) -> _Keeping:
        packed = self.format != "float32"
        return _Keeping(
            packed,
            FORMATS.index(self.format) if packed else 0,
            self.key_sparsity,
            self.value_sparsity,
            self.recent,
            self.first,
        )


class Blocks:
    """Keys and values of one layer, in native memory. Copies and unpickled objects have their own memory.

    Arguments:
        heads: key-value heads, times the sequences of a batch.
        width: elements of a head.
    """

    def __init__(self, keeping: Keeping, heads: int, width: int):
        native: Any = library()
        if native is None:
            raise PackedError(
                "a BlockCache needs pliant's kernels, which are not available; run 'pliant doctor' for the reason"
            )
        settings = keeping.native()
        self._take(keeping, heads, width, native.pliant_cache_new(heads, width, ctypes.byref(settings)))

    def _take(self, keeping: Keeping, heads: int, width: int, handle: int) -> None:
        native: Any = library()
        self.keeping, self.heads, self.width, self.handle = keeping, heads, width, handle
        weakref.finalize(self, native.pliant_cache_end, handle)

    def __copy__(self) -> Blocks:
        native: Any = library()
        copied = Blocks.__new__(Blocks)
        copied._take(self.keeping, self.heads, self.width, native.pliant_cache_copy(self.handle))
        return copied

    def __deepcopy__(self, _: Any) -> Blocks:
        return self.__copy__()

    def __reduce__(self) -> Any:
        return _filled, (self.keeping, self.heads, self.width, *self.read())

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens; shape ``(tokens, heads * width)`` each, float32, contiguous."""
        native: Any = library()
        native.pliant_cache_append(self.handle, keys.data_ptr(), values.data_ptr(), *keys.shape)
        native.pliant_cache_settle(self.handle, threads())

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, shape ``(heads, tokens, width)``, float32.

        Values of packed blocks lie on the rounding grid, so packing them again in another cache is exact.
        """
        native: Any = library()
        shape = (self.heads, self.length(), self.width)
        keys, values = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
        native.pliant_cache_read(self.handle, keys.data_ptr(), values.data_ptr())
        return keys, values

    def length(self) -> int:
        """Number of tokens."""
        native: Any = library()
        return native.pliant_cache_length(self.handle)

    def bytes(self) -> int:
        """Bytes that keys and values take."""
        native: Any = library()
        return native.pliant_cache_bytes(self.handle)

    def crop(self, length: int) -> None:
        """Drop all but the first ``length`` tokens."""
        native: Any = library()
        native.pliant_cache_crop(self.handle, length)


def _filled(keeping: Keeping, heads: int, width: int, keys: torch.Tensor, values: torch.Tensor) -> Blocks:
    blocks = Blocks(keeping, heads, width)
    blocks.append(*(states.transpose(0, 1).reshape(states.shape[1], -1).contiguous() for states in (keys, values)))
    return blocks


@functools.cache
def per_token(keeping: Keeping, heads: int, width: int) -> float:
    """Bytes per token in one layer, once packed."""
    blocks = Blocks(dataclasses.replace(keeping, recent=0, first=0), heads, width)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2 * BLOCK, heads * width, generator=generator, dtype=torch.float32)
    sizes = []
    for keys, values in zip(states[0].split(BLOCK), states[1].split(BLOCK), strict=True):
        blocks.append(keys, values)
        sizes.append(blocks.bytes())
    return (sizes[1] - sizes[0]) / BLOCK
