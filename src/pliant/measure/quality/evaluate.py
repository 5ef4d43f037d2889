"""Evaluate a model: perplexity, divergence from another model, accuracy on questions."""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from pliant.anatomy import anatomy_of
from pliant.checkpoint.load import loaded, tokenizer_of
from pliant.data import Continuation, OpenQuestion, Question, Text, questions, text
from pliant.data.question_files.kinds import questions_digest
from pliant.data.text import unpacked
from pliant.digest import digest
from pliant.errors import DataError, PliantError, WeightError
from pliant.forward.losses import kl, nll, nll_sum
from pliant.forward.stream import Stream
from pliant.forward.windows import (
    batches_of,
    check_ids,
    check_model,
    longest_of,
    not_finite,
    tokens_at_once,
    windows_for,
    within_memory,
)
from pliant.measure.quality.generated_answers import answer
from pliant.measure.quality.lm_eval_harness import harness as run_harness
from pliant.measure.quality.multiple_choice import choose, continuations
from pliant.pages import pages_of

Source = str | Path | Text
Questions = Sequence[Question] | Sequence[OpenQuestion] | Sequence[Continuation]
MOST = math.log(sys.float_info.max)  # nats whose exponential does not overflow

SHARES = {"acc": "stderr", "acc_norm": "stderr_norm", "match": "stderr"}
"""Metrics of tasks -> the key of the standard error of each."""


def evaluate(
    model: Any,
    *,
    perplexity: Source | Sequence[Source] = (),
    tasks: Sequence[str | Path] | Mapping[str, Questions] = (),
    harness: Sequence[str] = (),
    reference: Any = None,
    tokenizer: Any = None,
    seqlen: int = 2048,
    windows: int | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    items: bool = False,
    dtype: Any = None,
    device: Any = None,
) -> dict[str, Any]:
    """Evaluate a causal language model.

    Arguments:
        model: a transformers model, evaluated on its device; or what :func:`pliant.load` takes.
        perplexity: text files (or ``pliant.text``), each evaluated on its own.
        tasks: question files, or questions by name; see :func:`pliant.questions`. Questions with choices are answered
            by likelihood, open ones by greedy generation; a continuation is correct if every token is the likeliest.
        harness: tasks of lm-eval, by name or YAML file; needs ``pip install 'pliant[eval]'``.
        reference: a model to compare next-token distributions with, on the same text; or what :func:`pliant.load`
            takes.
        seqlen: tokens in a window; at most the model's positions are used.
        windows: maximum number of windows of each text.
        limit: maximum number of questions of each task.
        max_new_tokens: maximum length of the answer to an open question.
        items: also return the figures of every window and question, for :func:`pliant.compare`.
        dtype, device: of models that are given by name or folder, as in :func:`pliant.load`.

    Returns:
        ``{"perplexity": {name: {"perplexity", "loss", "stderr", "windows", "seqlen"[, "kl"]}}, "tasks": {name: {"acc",
        "acc_norm", "stderr", "stderr_norm", "questions"}}}``; a task of open questions has ``{"match", "stderr",
        "questions"}``, one of continuations ``{"acc", "stderr", "perplexity", "stderr_perplexity", "questions"}``.
        ``stderr`` is one standard error: of the loss in nats per token, of acc or match. ``"harness"`` is only there
        when asked for. With ``items`` every text has ``"items": {"digest", "loss"}``, every task ``{"digest"}`` and 0
        or 1 for each question under its metrics.

    Raises:
        ArchitectureError: a model that predicts no next tokens.
        DataError: nothing to evaluate, or text or questions that cannot be used.
        WeightError: the loss, or the log-likelihood of a choice, is not finite.
        PliantError: lm-eval is needed but not installed, or fails.
    """
    texts = [perplexity] if isinstance(perplexity, str | Path | Text) else list(perplexity)
    asked: dict[str, Questions] = dict(tasks) if isinstance(tasks, Mapping) else {}
    if not isinstance(tasks, Mapping):
        for path in tasks:
            asked[_unused(unpacked(Path(path)).stem, asked)] = questions(path, limit)
    if not texts and not asked and not harness:
        raise DataError("nothing to evaluate: give perplexity= some text or tasks= some question files")
    model = loaded(model, dtype=dtype, device=device)
    reference = None if reference is None else loaded(reference, dtype=dtype, device=device)
    measured = [model] if reference is None else [model, reference]
    for each in measured:
        check_model(each)
    tokenizer = tokenizer or tokenizer_of(model)
    seqlen = min(seqlen, *map(longest_of, measured))
    was_training = [each.training for each in measured]
    for each in measured:
        each.eval()
    try:
        result: dict[str, Any] = {"perplexity": {}, "tasks": {}}
        for source in texts:
            rows = source if isinstance(source, Text) else text(source)
            ids = windows_for(model, tokenizer, rows, seqlen, windows)
            if reference is not None:
                check_ids(reference, ids)
            name = _unused(rows.source, result["perplexity"])
            result["perplexity"][name] = _predict(model, name, ids, reference, items)
        for name, some in asked.items():
            result["tasks"][name] = _ask(model, tokenizer, name, list(some)[:limit], max_new_tokens, items)
        if harness:
            result["harness"] = run_harness(model, tokenizer, harness, limit=limit, items=items)
        return result
    finally:
        for each, training in zip(measured, was_training, strict=True):
            each.train(training)


def _unused(name: str, taken: Container[str]) -> str:
    """``name``, or ``name (2)`` if two files have the same name."""
    number = 1
    while (numbered := name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return numbered


def _predict(model: Any, name: str, ids: torch.Tensor, reference: Any, keep: bool) -> dict[str, Any]:
    start = min(tokens_at_once(each) for each in (model, reference) if each is not None)
    if pages_of(model) is None:
        start = max(start, ids.shape[1])
    loss, divergence = within_memory(model, lambda tokens: _losses(model, ids, reference, tokens), start)
    mean = loss.mean().item()
    if not math.isfinite(mean):
        raise not_finite(model, f"the model's loss on {name!r} is {mean}")
    if mean > MOST:
        raise WeightError(
            f"the model's loss on {name!r} is {mean:.4g} nats per token, and its perplexity overflows; check the "
            "model's weights"
        )
    result = {
        "perplexity": math.exp(mean),
        "loss": mean,
        "stderr": (loss.std() / len(loss) ** 0.5).item() if len(loss) > 1 else None,
        "windows": len(loss),
        "seqlen": ids.shape[1],
    }
    if divergence is not None:
        result["kl"] = divergence.mean().item()
        if not math.isfinite(result["kl"]):
            raise not_finite(reference, f"the divergence on {name!r} from the reference is {result['kl']}")
    if keep:
        windows = digest([ids.numpy().tobytes()])
        result["items"] = {"digest": f"{windows}, {ids.shape[1]} tokens each", "loss": loss.tolist()}
    return result


@torch.inference_mode()
def _losses(model: Any, ids: torch.Tensor, reference: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean loss of every window and, with a reference, mean divergence from it; float64, shape ``(windows,)``.

    Arguments:
        tokens: tokens per forward pass; for a longer window, logits are computed for this many positions at a time.
    """
    losses, divergences = [], []
    stream = _stream(model) if reference is None and tokens < ids.shape[1] else None
    for batch in batches_of(model, ids, tokens):
        if stream is not None:
            parts = stream.parts(batch, tokens)
            sums = [nll_sum(logits, batch[:, where.start + 1 : where.stop + 1]) for where, logits in parts]
            losses.append(torch.stack(sums).sum(0) / (batch.shape[1] - 1))
            continue
        logits = model(input_ids=batch, use_cache=False).logits
        losses.append(nll(logits, batch))
        if reference is not None:
            theirs = reference(input_ids=batch.to(reference.device), use_cache=False).logits.to(logits.device)
            if theirs.shape != logits.shape:
                raise DataError(
                    f"the reference has a vocabulary of {theirs.shape[-1]}, the model one of {logits.shape[-1]}; "
                    "divergence is defined only between models with the same vocabulary"
                )
            divergences.append(kl(logits, theirs))
    return torch.cat(losses), torch.cat(divergences) if divergences else None


def _stream(model: Any) -> Stream | None:
    """A stream to compute logits in parts; None if the model has no anatomy.

    Raises:
        PliantError: it has none, and its memory is limited.
    """
    try:
        return Stream(model, anatomy_of(model))
    except PliantError:
        if pages_of(model) is not None:
            raise
        return None


def _ask(
    model: Any, tokenizer: Any, name: str, items: Sequence[Any], max_new_tokens: int, keep: bool
) -> dict[str, Any]:
    """Shares of correctly answered questions, and their standard errors."""
    if not items:
        raise DataError(f"task {name!r} has no questions")
    if all(isinstance(item, Continuation) for item in items):
        return _continue(model, tokenizer, name, items, keep)
    if all(isinstance(item, Question) for item in items):
        right = choose(model, tokenizer, name, items)
    elif all(isinstance(item, OpenQuestion) for item in items):
        right = answer(model, tokenizer, name, items, max_new_tokens)
    else:
        raise DataError(
            f"task {name!r} mixes questions with choices, open questions and continuations; put each kind into its "
            "own task"
        )
    shares = {metric: sum(each) / len(each) for metric, each in right.items()}
    errors = {SHARES[metric]: (share * (1 - share) / len(items)) ** 0.5 for metric, share in shares.items()}
    row = {**shares, **errors, "questions": len(items)}
    if keep:
        # the maximum length of answers affects which ones match
        settings = f", {max_new_tokens} new tokens" if "match" in right else ""
        figures = {metric: [int(correct) for correct in each] for metric, each in right.items()}
        row["items"] = {"digest": questions_digest(items) + settings, **figures}
    return row


def _continue(model: Any, tokenizer: Any, name: str, items: Sequence[Continuation], keep: bool) -> dict[str, Any]:
    """Share of continuations whose tokens are all the likeliest, and perplexity per continuation, as in lm-eval."""
    likely = continuations(model, tokenizer, name, items)
    losses = [-each.log_likelihood for each in likely]
    right = [int(each.greedy) for each in likely]
    mean, share = sum(losses) / len(losses), sum(right) / len(right)
    if mean > MOST:
        raise WeightError(
            f"task {name!r}: the mean loss of a continuation is {mean:.4g} nats, and its perplexity overflows; check "
            "the model's weights"
        )
    perplexity = math.exp(mean)
    row: dict[str, Any] = {
        "acc": share,
        "stderr": (share * (1 - share) / len(items)) ** 0.5,
        "perplexity": perplexity,
        # standard error of the mean loss, times the derivative of exp at it
        "stderr_perplexity": perplexity * stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
        "questions": len(items),
    }
    if keep:
        row["items"] = {"digest": questions_digest(items), "acc": right, "loss": losses}
    return row
