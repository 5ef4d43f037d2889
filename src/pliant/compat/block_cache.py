"""A transformers key-value cache that stores :class:`pliant.runtime.kv_blocks.Blocks`.

It is passed like any cache: ``model.generate(..., past_key_values=pliant.BlockCache(...))``. A stock model gets all
keys and values back as tensors at every step; a native run attends to the blocks directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from pliant.errors import PackedError
from pliant.runtime.kv_blocks import Blocks, Keeping
from pliant.runtime.packed_weight import writes


class ReadOnly(torch.Tensor):
    """A copy of keys or values. It and views of it refuse to be changed in place: the cache would not see the
    change."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute ``func`` as for a plain tensor.

        Raises:
            PackedError: ``func`` changes its first argument.
        """
        kwargs = kwargs or {}
        if writes(func.__name__) and args and isinstance(args[0], cls):
            raise PackedError(
                "keys and values in blocks cannot be changed in place; pass a cache of another kind, or clone them "
                "first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            own = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)}
            result = func(*args, **kwargs)
            return tree_map_only(
                torch.Tensor, lambda leaf: leaf.as_subclass(cls if _memory(leaf) in own else torch.Tensor), result
            )


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class BlockLayer(CacheLayerMixin):
    """Keys and values of one layer. The sequences of a batch are stored as additional heads."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, keeping: Keeping | None = None):
        self.keeping = keeping or Keeping()
        self.blocks: Blocks | None = None
        self.batch = 1
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """A copy of all keys, shape ``(batch, heads, tokens, width)``; None before the first token."""
        return self._states(0)

    @keys.setter
    def keys(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse(value)

    @property
    def values(self) -> torch.Tensor | None:
        """A copy of all values, of the same shape."""
        return self._states(1)

    @values.setter
    def values(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse(value)

    def _states(self, which: int) -> torch.Tensor | None:
        if self.blocks is None:
            return None
        return self.read()[which].to(getattr(self, "dtype", torch.float32)).as_subclass(ReadOnly)

    def _refuse(self, value: Any) -> None:
        """Keys and values are added with :meth:`update`; the constructor of transformers sets both to None."""
        if value is not None:
            raise PackedError(
                "keys and values in blocks cannot be replaced; add tokens with update, or use another cache"
            )

    def open(self, batch: int, heads: int, width: int) -> Blocks:
        """The blocks of this layer, created at the first token.

        Raises:
            PackedError: the blocks hold another number of sequences or heads, or heads of another width.
        """
        if self.blocks is None:
            self.blocks = Blocks(self.keeping, batch * heads, width)
            self.batch = batch
            self.is_initialized = True
        elif (self.batch, self.blocks.heads, self.blocks.width) != (batch, batch * heads, width):
            raise PackedError(
                f"this cache holds {self.batch} sequence(s) with {self.blocks.heads // self.batch} heads of width "
                f"{self.blocks.width}; {batch} with {heads} heads of width {width} cannot be added; use a new cache"
            )
        return self.blocks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the blocks for keys and values of shape ``(batch, heads, tokens, width)`` each."""
        self._open_for(key_states, value_states)

    def _open_for(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Blocks:
        if value_states.shape != key_states.shape:
            raise PackedError("a BlockCache needs keys and values of equal shape; use the model's own cache")
        self.dtype, self.device = key_states.dtype, key_states.device
        return self.open(key_states.shape[0], key_states.shape[1], key_states.shape[3])

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Add tokens; shape ``(batch, heads, tokens, width)`` each."""
        blocks = self._open_for(key_states, value_states)
        flat = [s.float().permute(2, 0, 1, 3).reshape(s.shape[2], -1).contiguous() for s in (key_states, value_states)]
        blocks.append(*flat)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, shape ``(batch, heads, tokens, width)``, float32.

        Raises:
            PackedError: nothing was added yet.
        """
        if self.blocks is None:
            raise PackedError("this cache has no tokens to read")
        keys, values = (states.unflatten(0, (self.batch, -1)) for states in self.blocks.read())
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens and return all keys and values, as attention in transformers expects them.

        The new tokens, and those not packed yet, are returned exactly.
        """
        self._open_for(key_states, value_states)
        before = self.read()
        self.append(key_states, value_states)
        both = zip(before, (key_states, value_states), strict=True)
        keys, values = (torch.cat([old.to(new), new], 2) for old, new in both)
        return keys, values

    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return 0 if self.blocks is None else self.blocks.bytes()

    def get_seq_length(self) -> int:
        return 0 if self.blocks is None else self.blocks.length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; a positive number is the number of tokens to keep (transformers
        5.14)."""
        if self.blocks is not None and tokens_to_remove:
            length = tokens_to_remove if tokens_to_remove > 0 else self.blocks.length() + tokens_to_remove
            self.blocks.crop(max(0, length))

    def reset(self) -> None:
        self.blocks = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._again(lambda states: states[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._again(lambda states: states.repeat_interleave(repeats, 0))

    def _again(self, change: Any) -> None:
        """Rebuild the blocks from changed rows of the batch."""
        if self.blocks is not None:
            keys, values = self.read()
            self.reset()
            self.append(change(keys), change(values))

    def offload(self) -> None:
        """Do nothing: the blocks stay in CPU memory."""

    prefetch = offload


def may_be_blocks(layer: Any) -> bool:
    """Whether a cache layer holds only keys and values, so that a :class:`BlockLayer` can replace it."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


class BlockCache(Cache):
    """A key-value cache in blocks for ``generate`` of any decoder.

    Layers with another state, such as convolutions, keep it as in transformers.

    Arguments:
        config: the model's config, which describes the layers.
        keeping: settings of :class:`Keeping`: ``format``, ``key_sparsity``, ``value_sparsity``, ``recent``, ``first``.

    Raises:
        PackedError: a setting is unknown or out of range, ``config`` is not a config, or no layer holds only keys and
            values.
    """

    def __init__(self, config: Any, **keeping: Any):
        kept = Keeping.of(keeping)
        if not isinstance(config, PreTrainedConfig):
            raise PackedError(
                "a BlockCache needs the config of a model, as in BlockCache(model.config); not a "
                f"{type(config).__name__}"
            )
        layers = [BlockLayer(kept) if may_be_blocks(layer) else layer for layer in DynamicCache(config=config).layers]
        if not any(isinstance(layer, BlockLayer) for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise PackedError(
                f"no cache layer of {config.model_type} holds only keys and values (they are {kinds}); use the "
                "model's own cache"
            )
        super().__init__(layers=layers)

    def bytes(self) -> int:
        """Bytes of the keys and values in blocks."""
        return sum(layer.bytes() for layer in self.layers if isinstance(layer, BlockLayer))
