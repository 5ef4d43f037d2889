"""Multiple-choice questions, answered by the likelihood of the choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pliant.data import Question
from pliant.errors import DataError
from pliant.measure.windows import check_ids, longest_of, open_ended, tokens_at_once

Ids = tuple[int, ...]


def choose(model: Any, tokenizer: Any, name: str, items: Sequence[Question]) -> dict[str, list[bool]]:
    """Which questions a model gets right.

    Returns:
        For every question, under ``acc``, whether the likeliest choice is the right one; under ``acc_norm``, whether the
        likeliest per character is, counted without the space before it as lm-eval does. A question of which the model gives
        some choice no number is not answered rightly.

    Raises:
        DataError: an empty context, or a tokenizer made for another model.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item, scores in zip(items, log_likelihoods(model, tokenizer, name, items), strict=True):
        each = [value / len(choice.removeprefix(" ")) for value, choice in zip(scores, item.choices, strict=True)]
        broken = any(math.isnan(value) for value in scores)
        right["acc"].append(not broken and scores.index(max(scores)) == item.answer)
        right["acc_norm"].append(not broken and each.index(max(each)) == item.answer)
    return right


@torch.inference_mode()
def log_likelihoods(model: Any, tokenizer: Any, name: str, items: Sequence[Question]) -> list[list[float]]:
    """For every choice of every question the log-likelihood of its tokens, in nats.

    The last token of a choice is only predicted, never read. Choices of one token after the same context therefore are one
    row of a batch, not one each.
    """
    wanted: dict[
        Ids, list[tuple[int, int, Ids]]
    ] = {}  # what to read: question, choice and tokens to predict at its end
    longest = longest_of(model)
    for number, place, read, predicted in _tokens(tokenizer, name, items):
        predicted = predicted[-longest:]
        wanted.setdefault(read[-longest:], []).append((number, place, predicted))
    check_ids(model, torch.tensor([max(max(read) for read in wanted), _largest(wanted.values())]))
    scores = [[0.0] * len(item.choices) for item in items]
    for batch in _batches(wanted, tokens_at_once(model)):
        width = len(batch[-1])
        # causal attention never looks right, so padding on the right changes nothing
        padded = torch.tensor([read + (0,) * (width - len(read)) for read in batch], device=model.device)
        logits = model(input_ids=padded, use_cache=False).logits
        for row, read in enumerate(batch):
            for number, place, predicted in wanted[read]:
                found = logits[row, len(read) - len(predicted) : len(read)].float()
                target = torch.tensor(predicted, device=found.device)
                scores[number][place] = -F.cross_entropy(found, target, reduction="sum").item()
    return scores


def _tokens(tokenizer: Any, name: str, items: Sequence[Question]) -> Iterator[tuple[int, int, Ids, Ids]]:
    """Question, choice, the tokens to read and those to predict from them, for every choice."""
    places = [(number, place) for number, item in enumerate(items) for place in range(len(item.choices))]
    pairs = [pair for item in items for pair in item.pairs]
    # white space belongs to the word behind it in most tokenizers: at the end of a context it would be a token of its own
    kept = [context.rstrip() or context for context, _ in pairs]
    contexts = open_ended(tokenizer, kept)
    wholes = open_ended(tokenizer, [context + choice for context, choice in pairs])
    for (number, place), context, whole in zip(places, contexts, wholes, strict=True):
        if not len(context) or len(whole) < 2:
            raise DataError(
                f"task {name!r}, question {number + 1}: the context gives no token to predict a choice from"
            )
        tail = min(max(1, len(whole) - len(context)), len(whole) - 1)
        yield number, place, tuple(whole[:-1]), tuple(whole[-tail:])


def _largest(wanted: Iterable[list[tuple[int, int, Ids]]]) -> int:
    return max(max(predicted) for entries in wanted for _, _, predicted in entries)


def _batches(rows: Iterable[Ids], tokens: int) -> Iterator[list[Ids]]:
    """Rows from short to long, as many at once as come to ``tokens`` when padded to the longest."""
    batch: list[Ids] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
