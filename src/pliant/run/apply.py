"""``pliant.apply``: apply a step, or several, to a model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from pliant.checkpoint.load import load, tokenizer_of
from pliant.checkpoint.packed_bytes import is_packed
from pliant.checkpoint.per_layer_config import write
from pliant.data import Examples, Text, text
from pliant.errors import DataError, MemoryLimitError, StepError
from pliant.pages import pages_of
from pliant.progress import Console, Progress, peak_memory
from pliant.step import Job, Step, recipe_of


def apply(
    model: Any,
    step: Step | Sequence[Step],
    data: Text | Examples | str | Path | None = None,
    *,
    tokenizer: Any = None,
    dense: Any = None,
    work: str | Path | None = None,
    progress: Progress | bool = True,
) -> Any:
    """Apply a step, or a recipe of several, to ``model`` in place, and return it.

    Arguments:
        model: a transformers model; for steps on values (``PackedLinear``, ``Magnitude``, ``RTN``, ``SparAMX``) any
            module with linear layers. The model is changed in place; to keep the original, copy it first
            (``copy.deepcopy``). An error or Ctrl-C leaves it unchanged, except in ``Magnitude``, ``RTN`` and
            ``SparAMX``; there a note on the exception says so.
        step: e.g. ``pliant.MultiPruner(ratio=0.2)``.
        data: calibration text: ``pliant.text(path)`` or a path. Steps that train also take ``pliant.examples(path)``.
        tokenizer: the model's tokenizer; by default that of the folder or hub id that the model was loaded from.
        dense: the model before it was cut, for steps that learn from it; by default it is loaded again from there.
        work: a folder in which every evaluation is kept; after a crash the same call resumes from it.
        progress: False for silence, or your own :class:`pliant.progress.Progress`.

    Returns:
        The same model, changed. ``model.save_pretrained(dir)`` of a transformers model writes a folder that reloads;
        ``model.pliant_history`` records the steps.

    Raises:
        StepError: before any work: ``model`` is not a model, ``step`` is not a step, or a step comes after one that
            packs.
        DataError: ``data`` is something else.
    """
    _check_model(model)
    steps = recipe_of(step)
    if isinstance(data, str | Path):
        data = text(data)
    if data is not None and not isinstance(data, Text | Examples):
        raise DataError(f"data must be pliant.text(path), pliant.examples(path) or a path; not {data!r}")
    shown = progress if isinstance(progress, Progress) else Console() if progress else Progress()
    check_trainable(model, steps)
    for one in steps:
        number = len(getattr(model, "pliant_history", [])) + 1
        folder = None if work is None else Path(work) / folder_name(number, one)
        apply_step(model, one, data, tokenizer=tokenizer, dense=dense, folder=folder, progress=shown)
    return model


def folder_name(number: int, step: Step) -> str:
    """Name of the folder of the step with this number, counted from 1: ``2-recover``."""
    return f"{number}-{step.kind}"


def apply_step(
    model: Any,
    step: Step,
    data: Text | Examples | None,
    *,
    tokenizer: Any,
    dense: Any,
    folder: Path | None,
    progress: Progress,
    earlier: Path | None = None,
) -> None:
    """Apply one step to ``model`` in place, and add its record to ``model.pliant_history``."""
    before = _parameters(model)
    job = Job(
        model=model,
        tokenizer=lambda: tokenizer if tokenizer is not None else tokenizer_of(model),
        dense=lambda: dense if dense is not None else _loaded_again(model),
        data=data,
        folder=folder,
        progress=progress,
        earlier=earlier,
    )
    began = time.monotonic()
    was_training = model.training
    try:
        step.run(job)
    finally:
        model.train(was_training)
    if job.model is not model:
        raise StepError(f"{step.kind} has put another model into job.model; a step changes the model in place")
    try:
        json.dumps(job.record)
    except (TypeError, ValueError) as error:
        raise StepError(f"{step.kind} has put a value into job.record that JSON cannot hold: {error}") from None
    if step.reshapes:
        write(model)
    record = {
        "settings": step.to_dict(),
        "data": None if data is None else {"source": data.source, "rows": len(data.rows), "hash": data.digest},
        "parameters_before": before,
        "parameters_after": _parameters(model) if step.reshapes else before,
        "seconds": time.monotonic() - began,
        "peak_memory": peak_memory(),
        **job.record,
    }
    model.pliant_history = [*getattr(model, "pliant_history", []), record]


def check_trainable(model: Any, steps: Sequence[Step]) -> None:
    """Refuse to train a model whose weights are in files.

    Raises:
        MemoryLimitError: one of the steps trains, and the model was loaded within a memory limit.
    """
    if any(step.trains for step in steps) and pages_of(model) is not None:
        raise MemoryLimitError(
            "training keeps all weights in memory; save the cut model, and train it without a memory limit"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        path = isinstance(model, str | Path)
        raise StepError(
            f"model must be a torch.nn.Module; not {model!r}"
            + (f"; load it first: pliant.load({str(model)!r})" if path else "")
        )


def _parameters(model: Any) -> int:
    """Parameters of a model that is not packed."""
    check_unpacked(model)
    return sum(0 if is_lazy(parameter) else parameter.numel() for parameter in model.parameters())


def check_unpacked(model: Any) -> None:
    """Refuse a model that no step can be applied to.

    Raises:
        StepError: it is packed.
    """
    if is_packed(model):
        raise StepError("this model is packed, and packing comes last; start from the model it was packed from")


def _loaded_again(model: Any) -> Any:
    if not getattr(model, "name_or_path", ""):
        raise StepError(
            "the dense model is unknown, because this model was not loaded from a folder or hub; give dense= or "
            "teacher="
        )
    return load(model.name_or_path)
