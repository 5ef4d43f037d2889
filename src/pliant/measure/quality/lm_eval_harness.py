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
    """The results of lm-eval, under the names of tasks or of their subtasks.

    Arguments:
        tasks: names of lm-eval tasks, or paths of its YAML files.

    Returns:
        ``{task: {METRIC: value, "METRIC_stderr": value, "questions": count}}``. A metric with a filter of the output is
        called ``metric,filter``. With ``items``, for each task also ``"items"``: a digest and the figures of every
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
        output = lm_eval.simple_evaluate(
            models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_ROWS_AT_ONCE),
            tasks=list(tasks),
            limit=limit,
            log_samples=items,
        )
    except (KeyError, ValueError, OSError) as error:  # an unknown task, or missing data
        raise PliantError(
            f"lm-eval cannot run {', '.join(map(str, tasks))}: {error.args[0] if error.args else error}"
        ) from error
    rows = {name: _row(name, row) for name, row in output["results"].items()}
    for name, counts in output["n-samples"].items():
        rows[name]["questions"] = counts["effective"]
    for name, samples in output["samples"].items() if items else ():
        rows[name]["items"] = _items(samples)
    return rows


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The results of a task, whose keys are ``metric,filter``; lm-eval writes a string if it has no result."""
    figures: dict[str, Any] = {}
    for key, value in row.items():
        metric, comma, output_filter = key.partition(",")
        if comma and not isinstance(value, str):
            ending = "_stderr" if metric.endswith("_stderr") else ""
            if isinstance(value, float) and not math.isfinite(value):
                raise WeightError(f"lm-eval's {metric} of {name} is {value}; check the model's weights")
            of = "" if output_filter == "none" else f",{output_filter}"
            figures[metric.removesuffix("_stderr") + of + ending] = value
    return figures


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
