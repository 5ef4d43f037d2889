"""Log-likelihoods of texts after a context, which answer multiple-choice questions and measure continuations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pliant.data import Continuation, Question
from pliant.errors import DataError
from pliant.forward.windows import check_ids, longest_of, not_finite, open_ended, within_memory

Ids = tuple[int, ...]


def choose(model: Any, tokenizer: Any, name: str, items: Sequence[Question]) -> dict[str, list[bool]]:
    """Answer every question with its likeliest choice.

    Returns:
        For every question, under ``acc``, whether the likeliest choice is the right one; under ``acc_norm``, whether
        the likeliest per character is, not counting the space before it, as in lm-eval.

    Raises:
        DataError: an empty context, or the tokenizer of another model.
        WeightError: the log-likelihood of a choice is not finite.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item, scores in zip(items, log_likelihoods(model, tokenizer, name, items), strict=True):
        each = [value / len(choice.removeprefix(" ")) for value, choice in zip(scores, item.choices, strict=True)]
        right["acc"].append(scores.index(max(scores)) == item.answer)
        right["acc_norm"].append(each.index(max(each)) == item.answer)
    return right


def continuations(model: Any, tokenizer: Any, name: str, items: Sequence[Continuation]) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context, and whether greedy generation would write it.

    Raises:
        DataError: an empty context, a continuation that is longer than the model's positions, or the tokenizer of
            another model.
        WeightError: the log-likelihood of a continuation is not finite.
    """
    likelihoods = _likelihoods(
        model, tokenizer, name, [(n, item.context, item.continuation) for n, item in enumerate(items, 1)]
    )
    for number, likelihood in enumerate(likelihoods, 1):
        if likelihood.cut:
            raise DataError(
                f"task {name!r}, row {number}: the continuation is longer than the {longest_of(model)} positions of "
                "this model; shorten or remove it"
            )
        value = likelihood.log_likelihood
        if not math.isfinite(value):
            raise not_finite(model, f"task {name!r}, row {number}: the log-likelihood is {value}")
    return likelihoods


def log_likelihoods(model: Any, tokenizer: Any, name: str, items: Sequence[Question]) -> list[list[float]]:
    """The log-likelihood of every choice of every question, in nats.

    Raises:
        DataError: an empty context, or the tokenizer of another model.
        WeightError: the log-likelihood of a choice is NaN, or no choice of a question has a finite one.
    """
    pairs = [(number, *pair) for number, item in enumerate(items, 1) for pair in item.pairs]
    flat = iter(_likelihoods(model, tokenizer, name, pairs))
    scores = [[next(flat).log_likelihood for _ in item.choices] for item in items]
    for number, each in enumerate(scores, 1):
        if any(math.isnan(value) for value in each) or not math.isfinite(max(each)):
            bad = next(value for value in each if not math.isfinite(value))
            raise not_finite(model, f"task {name!r}, question {number}: the log-likelihood of a choice is {bad}")
    return scores


@dataclass(frozen=True)
class Likelihood:
    """The log-likelihood of a continuation.

    Attributes:
        log_likelihood: the sum over its tokens, in nats.
        greedy: whether each token is the likeliest after those before it.
        cut: whether its first tokens were left out, because it is longer than the model's positions.
    """

    log_likelihood: float
    greedy: bool
    cut: bool


def _likelihoods(model: Any, tokenizer: Any, name: str, pairs: Sequence[tuple[int, str, str]]) -> list[Likelihood]:
    """The likelihood of every continuation.

    The last token of a continuation is predicted but never read. So choices of one token after the same context share
    one row of a batch.

    Arguments:
        pairs: row number for error messages, context, continuation.
    """
    # tokens to read -> (index of the pair, tokens to predict at the end, whether they were cut)
    wanted: dict[Ids, list[tuple[int, Ids, bool]]] = {}
    longest = longest_of(model)
    for index, (read, predicted) in enumerate(_tokens(tokenizer, name, pairs)):
        last = predicted[-longest:]
        wanted.setdefault(read[-longest:], []).append((index, last, len(last) < len(predicted)))
    check_ids(model, torch.tensor([max(max(read) for read in wanted), _largest(wanted.values())]))
    return within_memory(model, lambda tokens: _scored(model, wanted, tokens))


@torch.inference_mode()
def _scored(model: Any, wanted: dict[Ids, list[tuple[int, Ids, bool]]], tokens: int) -> list[Likelihood]:
    """:func:`_likelihoods` with at most ``tokens`` tokens per forward pass, padding included."""
    scores: dict[int, Likelihood] = {}
    for batch in _batches(wanted, tokens):
        width = len(batch[-1])
        # causal attention never looks right, so padding on the right changes nothing
        padded = torch.tensor([read + (0,) * (width - len(read)) for read in batch], device=model.device)
        logits = model(input_ids=padded, use_cache=False).logits
        for row, read in enumerate(batch):
            for index, predicted, cut in wanted[read]:
                last = logits[row, len(read) - len(predicted) : len(read)].float()
                target = torch.tensor(predicted, device=last.device)
                value = -F.cross_entropy(last, target, reduction="sum").item()
                scores[index] = Likelihood(value, bool((last.argmax(-1) == target).all()), cut)
    return [scores[index] for index in range(len(scores))]


def _tokens(tokenizer: Any, name: str, pairs: Sequence[tuple[int, str, str]]) -> Iterator[tuple[Ids, Ids]]:
    """The tokens to read and those to predict from them, for every pair."""
    # white space belongs to the word behind it in most tokenizers: at the end of a context it would be a token of its
    # own
    contexts = open_ended(tokenizer, [context.rstrip() or context for _, context, _ in pairs])
    wholes = open_ended(tokenizer, [context + continuation for _, context, continuation in pairs])
    for (number, _, _), context, whole in zip(pairs, contexts, wholes, strict=True):
        if not len(context) or len(whole) < 2:
            raise DataError(f"task {name!r}, question {number}: the context has no token to predict a choice from")
        tail = min(max(1, len(whole) - len(context)), len(whole) - 1)
        yield tuple(whole[:-1]), tuple(whole[-tail:])


def _largest(wanted: Iterable[list[tuple[int, Ids, bool]]]) -> int:
    return max(max(predicted) for entries in wanted for _, predicted, _ in entries)


def _batches(rows: Iterable[Ids], tokens: int) -> Iterator[list[Ids]]:
    """Rows from short to long, as many at once as come to ``tokens`` when padded to the longest."""
    batch: list[Ids] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
