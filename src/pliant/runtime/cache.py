"""A key-value cache in blocks of 64 tokens that grows, and packs the older blocks.

It takes the place of any cache of transformers: ``model.generate(..., past_key_values=pliant.BlockCache(...))``. A stock model
gets all keys and values back as tensors at every step; the native decoder attends to the blocks as they are.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pliant.errors import PackedError
from pliant.runtime.library import library
from pliant.runtime.packed import FORMATS
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
        format: what older blocks are packed to: bf16, int8, or float32 to keep all as they are.
        key_sparsity: share of each block's keys, the smallest ones, that is zeroed when it is packed; after the rotary
            positions, for every head on its own.
        value_sparsity: the same of values.
        recent: tokens at the end that stay float32.
        first: tokens at the beginning of which nothing is zeroed.
    """

    format: str = "bf16"
    key_sparsity: float = 0.0
    value_sparsity: float = 0.0
    recent: int = 64
    first: int = 4

    def __post_init__(self) -> None:
        if self.format not in ("float32", "bf16", "int8"):
            raise PackedError(f"a cache is kept as float32, bf16 or int8, not {self.format!r}")
        for name, share in (("key_sparsity", self.key_sparsity), ("value_sparsity", self.value_sparsity)):
            if not 0 <= share < 1:
                raise PackedError(f"{name} is a share from 0 to below 1, not {share!r}")
            if share and self.format == "float32":
                raise PackedError(f"{name} needs packed blocks: format bf16 or int8")
        if self.recent < 0 or self.first < 0:
            raise PackedError("recent and first are numbers of tokens")

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


@functools.cache
def per_token(keeping: Keeping, heads: int, width: int) -> float:
    """Bytes that a token takes in a layer once it is packed."""
    layer = BlockLayer(dataclasses.replace(keeping, recent=0, first=0))
    states = torch.randn(2, 1, heads, 2 * BLOCK, width, generator=torch.Generator().manual_seed(0))
    sizes = []
    for block in states.split(BLOCK, 3):
        layer.append(*block)
        sizes.append(layer.bytes())
    return (sizes[1] - sizes[0]) / BLOCK


class BlockLayer(CacheLayerMixin):
    """Keys and values of one layer. Those of a batch are heads beside each other."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, keeping: Keeping | None = None):
        super().__init__()
        self.keeping = keeping or Keeping()
        self.handle: int | None = None
        self.batch = 1

    def open(self, batch: int, heads: int, width: int) -> int:
        """Make the native cache at the first token; its handle."""
        if self.handle is None:
            native: Any = library()
            if native is None:
                raise PackedError("a BlockCache needs pliant's kernels, which are not there: see 'pliant doctor'")
            keeping = self.keeping.native()
            handle: int = native.pliant_cache_new(batch * heads, width, ctypes.byref(keeping))
            self.handle = handle
            self._finalizer = weakref.finalize(self, native.pliant_cache_end, handle)
            self.batch, self.heads, self.width = batch, heads, width
            self.is_initialized = True
            return handle
        return self.handle

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Arguments: shape ``(batch, heads, tokens, width)`` each."""
        if value_states.shape != key_states.shape:
            raise PackedError("keys and values of different shapes are not kept in blocks")
        self.open(key_states.shape[0], key_states.shape[1], key_states.shape[3])
        self.dtype, self.device = key_states.dtype, key_states.device

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Add tokens; shape ``(batch, heads, tokens, width)`` each."""
        if self.handle is None:
            self.lazy_initialization(key_states, value_states)
        flat = [s.float().permute(2, 0, 1, 3).reshape(s.shape[2], -1).contiguous() for s in (key_states, value_states)]
        native: Any = library()
        native.pliant_cache_append(self.handle, flat[0].data_ptr(), flat[1].data_ptr(), *flat[0].shape)
        native.pliant_cache_settle(self.handle, threads())

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, shape ``(batch, heads, tokens, width)``, float32."""
        native: Any = library()
        shape = (self.batch, self.heads, self.get_seq_length(), self.width)
        keys, values = torch.empty(shape), torch.empty(shape)
        native.pliant_cache_read(self.handle, keys.data_ptr(), values.data_ptr())
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens and return all there are, as attention in transformers wants them.

        The tokens of a call see each other, and what is not packed by then, as they are.
        """
        if self.handle is None:
            self.lazy_initialization(key_states, value_states)
        before = self.read()
        self.append(key_states, value_states)
        both = zip(before, (key_states, value_states), strict=True)
        keys, values = (torch.cat([old.to(new.dtype), new], 2) for old, new in both)
        return keys, values

    def bytes(self) -> int:
        """Bytes that keys and values take."""
        native: Any = library()
        return 0 if self.handle is None else native.pliant_cache_bytes(self.handle)

    def get_seq_length(self) -> int:
        native: Any = library()
        return 0 if self.handle is None else native.pliant_cache_length(self.handle)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        native: Any = library()
        if self.handle is not None and tokens_to_remove:
            native.pliant_cache_crop(self.handle, max(0, self.get_seq_length() - abs(tokens_to_remove)))

    def reset(self) -> None:
        if self.handle is not None:
            self._finalizer()
            self.handle = None
            self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._again(lambda states: states[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._again(lambda states: states.repeat_interleave(repeats, 0))

    def _again(self, change: Any) -> None:
        """Rebuild from other rows of the batch. Packed blocks lie on their grid already and stay what they are."""
        if self.handle is not None:
            keys, values = self.read()
            self.reset()
            self.append(change(keys), change(values))

    def offload(self) -> None:
        """It is where it belongs."""

    prefetch = offload


class BlockCache(Cache):
    """A cache of :class:`BlockLayer` for ``generate`` of any decoder.

    Arguments:
        config: the model's config, for the number of layers.
        keeping: settings of :class:`Keeping`: ``format``, ``key_sparsity``, ``value_sparsity``, ``recent``, ``first``.
    """

    def __init__(self, config: Any, **keeping: Any):
        kept = Keeping(**keeping)
        depth = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[BlockLayer(kept) for _ in range(depth)])

    def bytes(self) -> int:
        """Bytes that all keys and values take."""
        return sum(layer.bytes() for layer in self.layers if isinstance(layer, BlockLayer))
