"""Token windows that fit a model, and forward passes that fit its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pliant.checkpoint.fingerprint import check_finite
from pliant.data import Text
from pliant.device import empty_cache, free_memory, is_short_of_memory
from pliant.errors import ArchitectureError, DataError, MemoryLimitError, WeightError
from pliant.pages import pages_of

USUAL = 2048
"""Default number of tokens in a window."""

TOKENS_AT_ONCE = 512  # per forward pass on a CPU: enough to keep matrix products busy, few enough for its caches
MOST_AT_ONCE = 32768  # per forward pass on an accelerator
FEWEST_AT_ONCE = 16  # a pass is not retried with fewer tokens
SHARE = 0.25  # of the free memory, for logits and activations of one forward pass

Result = TypeVar("Result")


def check_model(model: Any) -> None:
    """Refuse a model whose loss on text cannot be measured.

    Raises:
        ArchitectureError: it is not a causal language model.
        MemoryLimitError: some of its weights are not in memory.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{type(model).__name__} is an encoder-decoder model; the loss on the next token needs a causal language "
            "model"
        )
    if not predicts(model):
        raise ArchitectureError(f"{type(model).__name__} predicts no next tokens; a causal language model is needed")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MemoryLimitError(
            "some weights of this model are offloaded; load it with memory= (pliant.load) instead of a device_map"
        )


def predicts(model: Any) -> bool:
    """Whether a model is a causal language model (it may also read images)."""
    if not getattr(model, "can_generate", bool)() or getattr(model.config, "is_encoder_decoder", False):
        return False
    decoder = model.get_decoder() or model  # a vision tower has non-causal attention
    return not any(getattr(module, "is_causal", None) is False for module in decoder.modules())


def batches_of(model: Any, windows: torch.Tensor, tokens: int | None = None) -> list[torch.Tensor]:
    """Split ``windows`` into batches for one forward pass each, on the model's device.

    Arguments:
        tokens: in one forward pass; default: :func:`tokens_at_once`.
    """
    device = next(model.parameters()).device
    return list(windows.to(device).split(max(1, (tokens or tokens_at_once(model)) // windows.shape[1])))


def tokens_at_once(model: Any) -> int:
    """Number of tokens per forward pass: the largest power of two whose logits and activations fit a quarter of the
    free memory.

    At most 512 on a CPU, where that is fastest, and at most 32,768 on an accelerator.
    """
    pages = pages_of(model)
    weight = next(model.parameters())
    vocabulary = model.get_input_embeddings().num_embeddings
    if pages is not None:
        return max(1, min(TOKENS_AT_ONCE, pages.limit // 16 // (vocabulary * weight.element_size())))
    most = TOKENS_AT_ONCE if weight.device.type == "cpu" else MOST_AT_ONCE
    free = free_memory(weight.device)
    if free is None:
        return min(most, TOKENS_AT_ONCE)
    hidden = model.config.get_text_config(decoder=True).hidden_size
    # logits and their log-softmax; hidden states, and the activations of an MLP and an attention
    each = (2 * vocabulary + 24 * hidden) * weight.element_size()
    fit = max(1, int(SHARE * free) // each)
    return min(most, 1 << fit.bit_length() - 1)


def within_memory(model: Any, work: Callable[[int], Result], tokens: int | None = None) -> Result:
    """Call ``work`` with a number of tokens per forward pass; if the device runs out of memory, repeat all of it with
    half as many.

    So the result is the same as if it had started with the number that fits.

    Arguments:
        tokens: the number to start with; default: :func:`tokens_at_once`.

    Raises:
        MemoryLimitError: the memory does not suffice for 16 tokens.
    """
    tokens = tokens or tokens_at_once(model)
    while (result := _tried(work, tokens)) is None:
        # not in an except clause: the exception would keep the tensors that filled the memory alive
        device = next(model.parameters()).device
        empty_cache(device)
        if tokens // 2 < FEWEST_AT_ONCE:
            raise MemoryLimitError(
                f"{device} has no memory for {tokens} tokens of this model at a time; load it with a smaller dtype, "
                "on the CPU, or with memory= (--memory)"
            )
        tokens //= 2
    return result[0]


def _tried(work: Callable[[int], Result], tokens: int) -> tuple[Result] | None:
    """The result of ``work`` in a tuple, or None if memory ran out."""
    try:
        return (work(tokens),)
    except (RuntimeError, MemoryError) as error:
        if not is_short_of_memory(error):
            raise
    return None


def seqlen_of(model: Any, seqlen: int | None, usual: int = USUAL) -> int:
    """Number of tokens in a window: ``seqlen``, or if that is None the smaller of ``usual`` and the model's positions.

    Raises:
        DataError: ``seqlen`` exceeds the model's positions.
    """
    longest = longest_of(model)
    if seqlen is None:
        return min(usual, longest)
    if seqlen > longest:
        raise DataError(
            f"windows of {seqlen} tokens are longer than the {longest} positions of this model; leave out seqlen, or "
            f"give at most {longest}"
        )
    return seqlen


def check_room(model: Any, prompt: int, tokens: int, name: str = "this model") -> None:
    """Raise if a prompt and the tokens generated after it exceed the model's positions.

    Arguments:
        prompt: tokens in the prompt.
        tokens: tokens to generate.

    Raises:
        DataError: their sum exceeds the model's positions.
    """
    longest = longest_of(model)
    if prompt + tokens > longest:
        most = f"at most {longest - prompt} new tokens, or a shorter prompt" if prompt < longest else "a shorter prompt"
        raise DataError(f"{prompt} + {tokens} tokens are more than the {longest} positions of {name}; give {most}")


def windows_for(model: Any, tokenizer: Any, text: Text, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """``text`` as windows of ``seqlen`` tokens, shape ``(windows, seqlen)``.

    Raises:
        DataError: too little text, windows longer than the model's positions, or the tokenizer of another model.
    """
    ids = text.windows(tokenizer, seqlen_of(model, seqlen), limit)
    check_ids(model, ids)
    return ids


def longest_of(model: Any) -> int:
    """The number of positions of a model; 2**31 if it sets no bound."""
    config = model.config.get_text_config(decoder=True)
    bounds = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len"))  # the latter: MPT
    return next((bound for bound in bounds if bound), 2**31)


def not_finite(model: Any, clause: str) -> WeightError:
    """The error for a model whose output is not finite.

    Arguments:
        clause: the quantity and its value.

    Raises:
        WeightError: the weights themselves are not finite; it names the first tensor.
    """
    check_finite(model)
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "load it with dtype='bfloat16' or 'float32'" if dtype == "float16" else "check the model's weights"
    return WeightError(f"{clause}: its weights are finite, but its outputs in {dtype} are not; {advice}")


def open_ended(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts to be continued, without the end token that some tokenizers append."""
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids[:-1] if end is not None and ids[-1:] == [end] else ids for ids in rows]


def check_ids(model: Any, ids: torch.Tensor) -> None:
    """Refuse token ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= rows:
        raise DataError(
            f"the tokenizer gives token id {int(ids.max())}, but the model knows only {rows}: this is the tokenizer "
            "of another model"
        )
