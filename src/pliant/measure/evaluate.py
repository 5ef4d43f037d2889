"""How good a model is: perplexity, divergence from another model, accuracy on multiple-choice questions."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pliant.checkpoint.load import tokenizer_of
from pliant.data import Question, Text, questions, text
from pliant.errors import DataError
from pliant.measure.score import kl, nll
from pliant.measure.walk import TOKENS_AT_ONCE
from pliant.measure.windows import check_ids, windows_for

Source = str | Path | Text


def evaluate(
    model: Any,
    *,
    perplexity: Source | Sequence[Source] = (),
    tasks: Sequence[str | Path] | Mapping[str, Sequence[Question]] = (),
    reference: Any = None,
    tokenizer: Any = None,
    seqlen: int = 2048,
    windows: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a causal language model.

    Arguments:
        perplexity: text files (or ``pliant.text``) to predict, one figure each.
        tasks: question files, or questions by name; see :func:`pliant.questions`.
        reference: a model to compare next-token distributions with, on the same text.
        seqlen: tokens in a window; shortened to what the model can read.
        windows: windows of each text at most.
        limit: questions of each task at most.

    Returns:
        ``{"perplexity": {name: {"perplexity", "loss", "stderr", "windows", "seqlen"[, "kl"]}}, "tasks": {name: {"acc",
        "acc_norm", "stderr", "questions"}}}``. ``stderr`` is one standard error: of the loss in nats per token, of acc.

    Raises:
        DataError: nothing to measure, or text or questions that cannot be used.
    """
    texts = [perplexity] if isinstance(perplexity, str | Path | Text) else list(perplexity)
    asked: dict[str, Sequence[Question]] = dict(tasks) if isinstance(tasks, Mapping) else {}
    if not isinstance(tasks, Mapping):
        for path in tasks:
            asked[_unused(Path(path).stem, asked)] = questions(path, limit)
    if not texts and not asked:
        raise DataError("nothing to evaluate: give perplexity= some text or tasks= some question files")
    tokenizer = tokenizer or tokenizer_of(model)
    config = model.config.get_text_config(decoder=True)
    seqlen = min(seqlen, getattr(config, "max_position_embeddings", None) or seqlen)
    measured = [model] if reference is None else [model, reference]
    was_training = [one.training for one in measured]
    for one in measured:
        one.eval()
    try:
        found: dict[str, Any] = {"perplexity": {}, "tasks": {}}
        for source in texts:
            rows = source if isinstance(source, Text) else text(source)
            ids = windows_for(model, tokenizer, rows, seqlen, windows)
            if reference is not None:
                check_ids(reference, ids)
            found["perplexity"][_unused(rows.source, found["perplexity"])] = _predict(model, ids, reference)
        for name, items in asked.items():
            found["tasks"][name] = _choose(model, tokenizer, name, list(items)[:limit])
        return found
    finally:
        for one, training in zip(measured, was_training, strict=True):
            one.train(training)


def _unused(name: str, taken: Container[str]) -> str:
    """``name``, or ``name (2)`` when two files are called the same."""
    number = 1
    while (numbered := name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return numbered


@torch.inference_mode()
def _predict(model: Any, ids: torch.Tensor, reference: Any) -> dict[str, Any]:
    losses, divergences = [], []
    for batch in ids.to(model.device).split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
        logits = model(input_ids=batch, use_cache=False).logits
        losses.append(nll(logits, batch))
        if reference is not None:
            theirs = reference(input_ids=batch.to(reference.device), use_cache=False).logits.to(logits.device)
            if theirs.shape != logits.shape:
                raise DataError(
                    f"the reference has a vocabulary of {theirs.shape[-1]}, the model one of {logits.shape[-1]}; divergence "
                    "is defined only between models with the same vocabulary"
                )
            divergences.append(kl(logits, theirs))
    loss = torch.cat(losses)
    result = {
        "perplexity": math.exp(min(loss.mean().item(), 700)),
        "loss": loss.mean().item(),
        "stderr": (loss.std() / len(loss) ** 0.5).item() if len(loss) > 1 else None,
        "windows": len(loss),
        "seqlen": ids.shape[1],
    }
    if divergences:
        result["kl"] = torch.cat(divergences).mean().item()
    return result


@torch.inference_mode()
def _choose(model: Any, tokenizer: Any, name: str, items: list[Question]) -> dict[str, Any]:
    """Accuracy by log-likelihood: ``acc`` picks the likeliest continuation, ``acc_norm`` the likeliest per byte."""
    if not items:
        raise DataError(f"task {name!r} has no questions")
    sequences: list[tuple[int, int, list[int], int]] = []  # question, choice, ids, tokens of the continuation
    for number, item in enumerate(items):
        for place, choice in enumerate(item.choices):
            context = tokenizer(item.context)["input_ids"]
            if not context:
                raise DataError(
                    f"task {name!r}, question {number + 1}: the context gives no token to predict a choice from"
                )
            whole = tokenizer(item.context + choice)["input_ids"]
            # a tokenizer may end a sequence with a special token; what follows the context is what counts
            sequences.append((number, place, whole, max(1, len(whole) - len(context))))
    check_ids(model, torch.tensor([max(max(ids) for _, _, ids, _ in sequences)]))
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
    scores = [[0.0] * len(item.choices) for item in items]
    sequences.sort(key=lambda entry: len(entry[2]))
    start = 0
    while start < len(sequences):
        width = len(sequences[start][2])
        count = 1
        while start + count < len(sequences) and len(sequences[start + count][2]) * (count + 1) <= TOKENS_AT_ONCE:
            width = len(sequences[start + count][2])
            count += 1
        group = sequences[start : start + count]
        start += count
        kept = [(number, place, ids[-longest:], tail) for number, place, ids, tail in group]
        width = max(len(ids) for _, _, ids, _ in kept)
        # causal attention never looks right, so padding on the right changes nothing
        padded = torch.tensor([ids + [0] * (width - len(ids)) for _, _, ids, _ in kept], device=model.device)
        logits = model(input_ids=padded, use_cache=False).logits
        for row, (number, place, ids, tail) in enumerate(kept):
            tail = min(tail, len(ids) - 1)
            predicted = logits[row, len(ids) - tail - 1 : len(ids) - 1].float()
            target = padded[row, len(ids) - tail : len(ids)]
            scores[number][place] = -F.cross_entropy(predicted, target, reduction="sum").item()
    right = right_norm = 0
    for item, score in zip(items, scores, strict=True):
        per_byte = [
            value / max(1, len(choice.strip().encode())) for value, choice in zip(score, item.choices, strict=True)
        ]
        right += score.index(max(score)) == item.answer
        right_norm += per_byte.index(max(per_byte)) == item.answer
    share = right / len(items)
    return {
        "acc": share,
        "acc_norm": right_norm / len(items),
        "stderr": (share * (1 - share) / len(items)) ** 0.5,
        "questions": len(items),
    }
