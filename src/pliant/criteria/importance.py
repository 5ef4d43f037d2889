"""``pliant.importance``: how much every unit of a model matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pliant.anatomy import evaluating
from pliant.checkpoint.load import tokenizer_of
from pliant.criteria.activation import activation_sizes
from pliant.criteria.l1 import l1_norms
from pliant.criteria.unit_fisher import damage_of_units
from pliant.data import Text, text
from pliant.elastic import described
from pliant.errors import DataError, PliantError
from pliant.forward.windows import check_model, seqlen_of, windows_for
from pliant.progress import Progress

MEASURES = {
    "activation": activation_sizes,
    "fisher": lambda model, anatomy, windows: damage_of_units(model, anatomy, windows, Progress()),
}
"""By what importance is read from calibration text; ``l1`` needs none."""


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
            calibration text. ``fisher``: the estimated rise of the loss without it, in nats per token.
        data: calibration text or its path, for ``activation`` and ``fisher``.
        tokenizer: the model's tokenizer; when left out, that of where the model was loaded from.
        samples, seqlen, seed: rows of the text, tokens in a window, and seed of the draw, as for a pruner.

    Returns:
        axis name -> a value for each unit, float64, shape ``(units,)``; by text only the axes that a matrix reads.

    Raises:
        PliantError: ``by`` is none of these.
        DataError: the text is missing, or too short for one window.
    """
    if by == "l1":
        return l1_norms(model, described(model))
    if by not in MEASURES:
        raise PliantError(f"by must be one of l1, {', '.join(MEASURES)}; not {by!r}")
    if data is None:
        raise DataError(f"importance by {by} is read from calibration text: pass data=pliant.text('some.txt')")
    check_model(model)
    rows = (data if isinstance(data, Text) else text(data)).sample(samples, seed)
    windows = windows_for(model, tokenizer or tokenizer_of(model), rows, seqlen_of(model, seqlen))
    with evaluating(model):
        return MEASURES[by](model, described(model), windows)
