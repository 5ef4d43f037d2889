"""``pliant.export``: write a model for tools that do not have pliant."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from pliant.checkpoint.load import loaded
from pliant.errors import ArtefactError
from pliant.progress import Progress
from pliant.registry import EXPORTS


def export(
    model: Any,
    out: str | Path,
    to: str = "homogeneous",
    *,
    overwrite: bool = False,
    dtype: Any = None,
    device: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Write ``model`` in a format that other tools read, and return the folder or file that was written.

    Arguments:
        model: a transformers model, or a folder or name for :func:`pliant.load`; it is not changed.
        out: the folder, or for ``gguf`` the file.
        to: ``homogeneous``: an ordinary model of fewer layers, for stock transformers, vLLM and llama.cpp. ``gguf``:
            one file for stock llama.cpp and Ollama.
        overwrite: replace an earlier result.
        dtype, device: as in :func:`pliant.load`, for a model given by folder or name.
        progress: shows what is written and proven; default: silent.
        options: of the format: ``type`` of the weights of ``gguf``, such as ``q4_0``.

    Raises:
        ArtefactError: the format or an option is unknown, the model cannot be written in it, or ``out`` cannot be
            written.
    """
    if to not in EXPORTS:
        raise ArtefactError(f"unknown export format {to!r}; choose from: {', '.join(EXPORTS)}")
    write = EXPORTS[to].load()
    taken = [name for name in inspect.signature(write).parameters if name not in _GIVEN]
    if unknown := [name for name in options if name not in taken]:
        advice = f"it has {', '.join(taken)}" if taken else "leave it out"
        raise ArtefactError(f"{to} has no option {unknown[0]}; {advice}")
    whole = loaded(model, dtype=dtype, device=device)
    return write(whole, Path(out).expanduser(), overwrite=overwrite, progress=progress or Progress(), **options)


_GIVEN = ("model", "out", "overwrite", "progress")  # to every format
