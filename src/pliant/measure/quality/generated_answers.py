"""Answer open questions by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pliant.data import OpenQuestion
from pliant.errors import DataError
from pliant.forward.windows import check_ids, longest_of, not_finite, open_ended, within_memory

ROWS_AT_ONCE = 16
STOP = "Question:"
"""A base model often continues with a new question after its answer; generation stops there."""


def answer(
    model: Any, tokenizer: Any, name: str, items: Sequence[OpenQuestion], max_new_tokens: int
) -> dict[str, list[bool]]:
    """Whether the generated text after each prompt gives the answer, under ``match``.

    Raises:
        DataError: an empty prompt, no room for an answer, or the tokenizer of another model.
        WeightError: the model's logits are not finite.
    """
    written = generate(model, tokenizer, name, [item.context for item in items], max_new_tokens)
    return {"match": [item.matches(text) for item, text in zip(items, written, strict=True)]}


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, name: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedily generated text after each prompt, until the model stops or begins a new question.

    A prompt that leaves less than ``max_new_tokens`` of the model's positions is cut at its beginning.
    """
    room = longest_of(model) - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} leaves no room for a question and its answer; the model has "
            f"{longest_of(model)} positions"
        )
    rows = [ids[-room:] for ids in open_ended(tokenizer, prompts)]
    for number, ids in enumerate(rows, 1):
        if not ids:
            raise DataError(f"task {name!r}, question {number}: the prompt has no token to continue from")
    check_ids(model, torch.tensor([max(max(ids) for ids in rows)]))
    each = max(len(ids) for ids in rows) + max_new_tokens

    def written(tokens: int) -> list[str]:
        return _written(model, tokenizer, name, rows, max_new_tokens, max(1, tokens // each))

    return within_memory(model, written, ROWS_AT_ONCE * each)


def _written(
    model: Any, tokenizer: Any, name: str, rows: list[list[int]], max_new_tokens: int, at_once: int
) -> list[str]:
    """The generated text after each row of token ids, in batches of ``at_once`` rows."""
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    written = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        _check_numbers(model, name, rows[batch[-1]])
        width = len(rows[batch[-1]])
        # generation continues on the right, so the padding is on the left; positions follow from the mask
        padded = torch.tensor([[pad] * (width - len(rows[number])) + rows[number] for number in batch])
        mask = torch.tensor([[0] * (width - len(rows[number])) + [1] * len(rows[number]) for number in batch])
        out = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            stop_strings=[STOP],
            tokenizer=tokenizer,
        )
        for number, text in zip(batch, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
            written[number] = text.partition(STOP)[0]
    return written


def _check_numbers(model: Any, name: str, ids: list[int]) -> None:
    """Raise if the largest logit is not finite: greedy generation would then pick an arbitrary token."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits
    if not torch.isfinite(logits.amax()):  # amax returns NaN if there is any
        raise not_finite(model, f"task {name!r}: the largest logit is {logits.amax().item()}")
