"""``pliant.apply``: the one verb. It takes a model and a step, and does the step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pliant.anatomy import anatomy_of
from pliant.checkpoint.load import tokenizer_of
from pliant.checkpoint.schema import write
from pliant.data import Text, text
from pliant.elastic import parameters
from pliant.progress import Console, Progress, peak_memory
from pliant.step import Job, Step, StepError


def apply(
    model: Any,
    step: Step | Sequence[Step],
    data: Text | str | Path | None = None,
    *,
    tokenizer: Any = None,
    work: str | Path | None = None,
    progress: Progress | bool = True,
) -> Any:
    """Apply a step, or a recipe of several, to ``model`` in place, and return it.

    Arguments:
        model: a transformers model. To keep the dense one, copy it first (``copy.deepcopy``).
        step: e.g. ``pliant.MultiPruner(ratio=0.2)``.
        data: calibration text: ``pliant.text(path)`` or a path.
        tokenizer: the model's tokenizer; when left out, that of where the model was loaded from.
        work: a folder in which every evaluation is kept; the same call after a crash goes on from there.
        progress: False for silence, or a :class:`pliant.progress.Progress` of your own.

    Returns:
        The same model, changed. ``model.save_pretrained(dir)`` writes a folder that reloads; what was done is in
        ``model.pliant_history``.
    """
    if isinstance(data, str | Path):
        data = text(data)
    shown = progress if isinstance(progress, Progress) else Console() if progress else Progress()
    for one in [step] if isinstance(step, Step) else list(step):
        if not isinstance(one, Step):
            raise StepError(f"a step is expected, such as pliant.MultiPruner(ratio=0.2); not {one!r}")
        before = parameters(anatomy_of(model))
        job = Job(
            model=model,
            tokenizer=lambda: tokenizer if tokenizer is not None else tokenizer_of(model),
            data=data,
            work=None if work is None else Path(work),
            progress=shown,
        )
        began = time.monotonic()
        was_training = model.training
        try:
            one.run(job)
        finally:
            model.train(was_training)
        write(model)
        history = [*getattr(model, "pliant_history", [])]
        history.append(
            {
                "settings": one.to_dict(),
                "data": None if data is None else {"source": data.source, "rows": len(data.rows), "hash": data.digest},
                "parameters_before": before,
                "parameters_after": parameters(anatomy_of(model)),
                "seconds": time.monotonic() - began,
                "peak_memory": peak_memory(),
                **job.record,
            }
        )
        model.pliant_history = history
    return model
