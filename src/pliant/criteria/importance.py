"""``pliant.importance``: how much every unit of a model matters."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from pliant.anatomy import Anatomy, evaluating
from pliant.checkpoint.load import tokenizer_of
from pliant.data import Text, text
from pliant.elastic import described
from pliant.errors import DataError, StepError
from pliant.forward.windows import check_model, not_finite, seqlen_of, windows_for
from pliant.registry import IMPORTANCE, find


def importance(
    model: Any,
    by: str = "l1",
    data: Text | str | Path | None = None,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    seqlen: int | None = None,
    seed: int = 42,
) -> dict[str, torch.Tensor]:
    """How much every unit of every axis matters: an MLP channel, a key-value group, a channel of a convolution.

    Arguments:
        model: a transformers model; it stays as it is.
        by: ``l1``: the L1 norm of the weights that produce the unit. ``activation``: the size of what it contributes on
            calibration text. ``fisher``: the estimated increase of the loss without it, in nats per token.
            ``module:function``: your own, see docs/adding.md.
        data: calibration text or its path, for all that read text.
        tokenizer: the model's tokenizer; when left out, that of where the model was loaded from.
        samples, seqlen, seed: rows of the text, tokens in a window, and seed of the draw, as for a pruner.

    Returns:
        axis name -> a value for each unit, float64, shape ``(units,)``. ``l1`` covers all axes; ``activation`` and
        ``fisher`` cover those that a matrix reads (channels, heads) and the state of scans, but not experts. Orders of
        pruners fall back to ``l1`` for the others. In Mamba-2 each group of heads has its own copy of the state: the
        value of a unit is summed over the copies, which pruners sort one by one.

    Raises:
        StepError: ``by`` is none of these.
        DataError: the text is missing, or too short for one window.
    """
    if not reads_text(by):
        return _over_copies(measured(model, described(model), by))
    if data is None:
        raise DataError(f"importance by {by} is read from calibration text: pass data=pliant.text('some.txt')")
    check_model(model)
    rows = (data if isinstance(data, Text) else text(data)).sample(samples, seed)
    windows = windows_for(model, tokenizer or tokenizer_of(model), rows, seqlen_of(model, seqlen))
    return _over_copies(measured(model, described(model), by, windows))


def _over_copies(sizes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A value for each unit, shape ``(units,)``, summed over its copies if it has several."""
    return {name: values.sum(0) if values.dim() > 1 else values for name, values in sizes.items()}


def reads_text(by: str) -> bool:
    """Whether an importance is read from calibration text: its function has an argument ``windows``."""
    return "windows" in inspect.signature(find(IMPORTANCE, by, "importance")).parameters


def measured(model: Any, anatomy: Anatomy, by: str, windows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The importance of every unit, by the name of the axis: shape ``axis.shape``, or ``(units,)`` if a function of
    your own gives all copies the same.

    Arguments:
        by: a name in the registry, or ``module:function``.
        windows: token ids, shape ``(windows, seqlen)``; needed if it :func:`reads_text`.

    Raises:
        StepError: the function returns something else than a value for each unit of some axes.
    """
    function = find(IMPORTANCE, by, "importance")
    with evaluating(model):
        found = function(model, anatomy, windows=windows) if reads_text(by) else function(model, anatomy)
    if not isinstance(found, dict) or not all(isinstance(values, torch.Tensor) for values in found.values()):
        raise StepError(f"importance {by!r} must return a dict of tensors, one for each axis")
    for name, values in found.items():
        axis = anatomy.axes.get(name)
        if axis is None or tuple(values.shape) not in ((axis.size,), axis.shape):
            raise StepError(
                f"importance {by!r} must give a value for each unit of an axis; for {name!r}, which has "
                f"{axis.size if axis else 0} units, it gave the shape {tuple(values.shape)}"
            )
        if values.is_complex() or not values.isfinite().all():
            if by in IMPORTANCE:
                raise not_finite(
                    model, f"no finite loss and no finite importance ({by} of {name}) on the calibration text"
                )
            raise StepError(f"importance {by!r} gave values for {name!r} that are not finite real numbers")
    return {name: values.double().cpu() for name, values in found.items()}
