"""Token windows that fit the model they are for."""

from __future__ import annotations

from typing import Any

import torch

from pliant.data import Text
from pliant.errors import DataError
from pliant.pages import pages_of

TOKENS_AT_ONCE = 512  # in one forward pass: enough to keep matrix products busy, few enough for their logits


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


def check_ids(model: Any, ids: torch.Tensor) -> None:
    """Refuse token ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= rows:
        raise DataError(
            f"the tokenizer gives token id {int(ids.max())}, the model knows only {rows}: this is the tokenizer of another model"
        )
