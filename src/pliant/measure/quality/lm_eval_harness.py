"""Tasks of lm-eval, run by lm-eval itself."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from pliant.digest import json_digest
from pliant.errors import MissingExtraError, PliantError, WeightError

_ROWS_AT_ONCE = 8


def harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, items: bool = False
) -> dict[str, Any]:
    """What lm-eval measures, under the names of its tasks, or of their parts.

    Arguments:
        tasks: names that lm-eval knows, or paths of its YAML files.

    Returns:
        ``{task: {METRIC: value, "METRIC_stderr": value, "questions": count}}``. A metric that is read from the output in
        several ways is called ``metric,way``. With ``items``, for each task also ``"items"``: a digest and the figures of every
        question.

    Raises:
        WeightError: a result is not finite.
        PliantError: lm-eval is not installed, does not know a task, or cannot get its data.
    """
    try:
        # untyped: a decorator hides the arguments of simple_evaluate from type checkers
        lm_eval: Any = importlib.import_module("lm_eval")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise MissingExtraError(
            f"harness tasks ({', '.join(map(str, tasks))}) need lm-eval: pip install 'pliant[eval]' ({error})"
        ) from None
    try:
        found = lm_eval.simple_evaluate(
            models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_ROWS_AT_ONCE),
            tasks=list(tasks),
            limit=limit,
            log_samples=items,
        )
    except (KeyError, ValueError, OSError) as error:  # a task it does not know; data that is not there
        raise PliantError(
            f"lm-eval cannot run {', '.join(map(str, tasks))}: {error.args[0] if error.args else error}"
        ) from error
    rows = {name: _row(name, row) for name, row in found["results"].items()}
    for name, counts in found["n-samples"].items():
        rows[name]["questions"] = counts["effective"]
    for name, samples in found["samples"].items() if items else ():
        rows[name]["items"] = _items(samples)
    return rows


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The results of a task: their keys are ``metric,way``; lm-eval writes a string where it has no result.

    Raises:
        WeightError: a result is not finite.
    """
    figures: dict[str, Any] = {}
    for key, value in row.items():
        metric, comma, way = key.partition(",")
        if comma and not isinstance(value, str):
            ending = "_stderr" if metric.endswith("_stderr") else ""
            if isinstance(value, float) and not math.isfinite(value):
                raise WeightError(f"lm-eval's {metric} of {name} is {value}; check the model's weights")
            figures[_metric(metric.removesuffix("_stderr"), way) + ending] = value
    return figures


def _metric(metric: str, way: str) -> str:
    return metric if way == "none" else f"{metric},{way}"


def _items(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of every question and a digest of the questions; some metrics only exist for a whole task."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    values: dict[str, Any] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                values.setdefault(f"{metric},{sample['filter']}".removesuffix(",none"), []).append(
                    float(sample[metric])
                )
    asked = [(sample["doc_id"], sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]) for sample in samples]
    return {"digest": json_digest(asked), **values}
