"""Questions answered in the model's own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pliant.data import OpenQuestion
from pliant.errors import DataError
from pliant.forward.windows import check_ids, longest_of, no_number, open_ended, within_memory

ROWS_AT_ONCE = 16
STOP = "Question:"
"""A model that was not taught when to stop goes on with a question of its own."""


def answer(
    model: Any, tokenizer: Any, name: str, items: Sequence[OpenQuestion], max_new_tokens: int
) -> dict[str, list[bool]]:
    """Whether what a model writes after each prompt gives the answer, under ``match``.

    Raises:
        DataError: an empty prompt, no room for an answer, or a tokenizer made for another model.
        WeightError: the model's logits are not finite.
    """
    written = generate(model, tokenizer, name, [item.context for item in items], max_new_tokens)
    return {"match": [item.matches(text) for item, text in zip(items, written, strict=True)]}


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, name: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The likeliest token after each other, until the model stops or begins a new question.

    Prompts that leave less than ``max_new_tokens`` of the positions of the model lose their beginning.
    """
    room = longest_of(model) - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} leaves no room for an answer and its question; the model reads "
            f"{longest_of(model)} tokens"
        )
    rows = [ids[-room:] for ids in open_ended(tokenizer, prompts)]
    for number, ids in enumerate(rows, 1):
        if not ids:
            raise DataError(f"task {name!r}, question {number}: the prompt gives no token to go on from")
    check_ids(model, torch.tensor([max(max(ids) for ids in rows)]))
    each = max(len(ids) for ids in rows) + max_new_tokens

    def written(tokens: int) -> list[str]:
        return _written(model, tokenizer, name, rows, max_new_tokens, max(1, tokens // each))

    return within_memory(model, written, ROWS_AT_ONCE * each)


def _written(
    model: Any, tokenizer: Any, name: str, rows: list[list[int]], max_new_tokens: int, at_once: int
) -> list[str]:
    """The generated text after each row of token ids, in batches of ``at_once`` rows."""
    pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    written = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        _check_numbers(model, name, rows[batch[-1]])
        width = len(rows[batch[-1]])
        # what is generated follows on the right, so the padding is on the left; the mask also says where positions begin
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
    """Raise if the logits have no finite maximum: greedy generation would then pick an arbitrary token."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits
    if not torch.isfinite(logits.amax()):  # amax returns NaN if there is any
        raise no_number(model, f"task {name!r}: the largest logit is {logits.amax().item()}")
