"""``pliant.export``: write a cut model for tools that do not have pliant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pliant.checkpoint.load import loaded
from pliant.errors import ArtefactError
from pliant.registry import EXPORTS
from pliant.run.save import save


def export(
    model: Any,
    out: str | Path,
    to: str = "homogeneous",
    *,
    overwrite: bool = False,
    dtype: Any = None,
    device: Any = None,
) -> Path:
    """Write ``model`` into the folder ``out`` in a format that other tools read, and return the folder.

    Arguments:
        model: a transformers model, or a folder or name for :func:`pliant.load`; it is not changed.
        to: ``homogeneous``: an ordinary model of fewer layers, for stock transformers, vLLM and llama.cpp.
        overwrite: replace an earlier result in ``out``.
        dtype, device: as in :func:`pliant.load`, for a model given by folder or name.

    Raises:
        ArtefactError: the format is unknown, the model cannot be written in it, or ``out`` cannot be written.
    """
    if to not in EXPORTS:
        raise ArtefactError(f"unknown export format {to!r}; choose from: {', '.join(EXPORTS)}")
    return save(EXPORTS[to].load()(loaded(model, dtype=dtype, device=device)), out, overwrite=overwrite)
