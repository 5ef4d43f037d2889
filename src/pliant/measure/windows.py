"""Token windows that fit the model they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pliant.data import Text
from pliant.errors import ArchitectureError, DataError, MemoryLimitError
from pliant.pages import pages_of

TOKENS_AT_ONCE = 512  # in one forward pass: enough to keep matrix products busy, few enough for their logits


def check_model(model: Any) -> None:
    """Refuse a model of which a loss in predicting text says nothing, or cannot be taken.

    Raises:
        ArchitectureError: it is no causal language model: it predicts no tokens, or it sees those that it predicts.
        MemoryLimitError: its weights are not in memory.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{type(model).__name__} is an encoder-decoder model, which reads one text and writes another; a loss in predicting the "
            "next tokens of a text needs a causal language model"
        )
    if not predicts(model):
        raise ArchitectureError(f"{type(model).__name__} predicts no next tokens; a causal language model is needed")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MemoryLimitError(
            "some weights of this model are offloaded; load it with memory= (pliant.load) instead of a device_map"
        )


def predicts(model: Any) -> bool:
    """Whether it is a causal language model, which may read images as well."""
    if not getattr(model, "can_generate", bool)() or getattr(model.config, "is_encoder_decoder", False):
        return False
    decoder = model.get_decoder() or model  # a vision tower sees all of an image
    return not any(getattr(module, "is_causal", None) is False for module in decoder.modules())


def batches_of(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """``windows`` on the device of a model, as many at a time as one forward pass takes."""
    device = next(model.parameters()).device
    return list(windows.to(device).split(max(1, tokens_at_once(model) // windows.shape[1])))


def tokens_at_once(model: Any) -> int:
    """Tokens that a model takes in one forward pass: fewer where a memory limit leaves little for their logits."""
    pages = pages_of(model)
    if pages is None:
        return TOKENS_AT_ONCE
    each = model.get_input_embeddings().num_embeddings * next(model.parameters()).element_size()
    return max(1, min(TOKENS_AT_ONCE, pages.limit // 16 // each))


def windows_for(model: Any, tokenizer: Any, text: Text, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """``text`` as windows of ``seqlen`` tokens, shape ``(windows, seqlen)``.

    Raises:
        DataError: too little text, windows longer than the model reads, or a tokenizer made for another model.
    """
    longest = longest_of(model)
    if seqlen > longest:
        raise DataError(f"windows of {seqlen} tokens are longer than the {longest} positions of this model")
    ids = text.windows(tokenizer, seqlen, limit)
    check_ids(model, ids)
    return ids


def longest_of(model: Any) -> int:
    """Tokens that a model can read at once; 2**31 when it sets no bound."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31


def open_ended(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that something follows, without the end that some tokenizers put behind everything."""
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids[:-1] if end is not None and ids[-1:] == [end] else ids for ids in rows]


def check_ids(model: Any, ids: torch.Tensor) -> None:
    """Refuse token ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= rows:
        raise DataError(
            f"the tokenizer gives token id {int(ids.max())}, the model knows only {rows}: this is the tokenizer of another model"
        )
