"""``pliant export --to gguf``: a model as one file that stock llama.cpp and Ollama open."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pliant.checkpoint.fingerprint import check_finite
from pliant.checkpoint.load import tokenizer_of
from pliant.errors import ArtefactError
from pliant.exporters.gguf.containers import planned
from pliant.exporters.gguf.metadata import metadata_of
from pliant.exporters.gguf.modelfile import modelfile
from pliant.exporters.gguf.plan import Plan
from pliant.exporters.gguf.proof import prove
from pliant.exporters.gguf.types import BY_LLAMA_CPP, TYPES
from pliant.exporters.gguf.writer import size_of, write
from pliant.files import replacing, write_text
from pliant.formatting import human_bytes
from pliant.progress import Progress
from pliant.runtime.llama_process import quantize, why_no_llama_cpp

MODELFILE = "Modelfile"
BEFORE = "f16"  # the type of the file that llama.cpp makes the others from


def write_gguf(model: Any, out: Path, *, overwrite: bool, progress: Progress, type: str = BEFORE) -> Path:
    """Write a model as a GGUF file, and a Modelfile for Ollama beside it.

    If llama.cpp is installed, it opens the file, and its logits are compared with those of the model.

    Arguments:
        out: the file, with the ending ``.gguf``.
        type: of the weights: one of ``TYPES``, or of those that llama.cpp itself makes.

    Raises:
        ArtefactError: no architecture of llama.cpp carries the model, the type is unknown, the file cannot be written,
            or llama.cpp computes something else from it. Nothing is left behind.
    """
    kind = type.lower()
    if kind not in TYPES and kind not in BY_LLAMA_CPP:
        raise ArtefactError(f"unknown type {type!r}; choose from: {', '.join((*TYPES, *BY_LLAMA_CPP))}")
    if kind in BY_LLAMA_CPP and (why := why_no_llama_cpp()):
        raise ArtefactError(
            f"{kind} weights are made by llama.cpp, and {why}; or write --type {BEFORE} and run 'llama-quantize "
            f"{out.with_suffix('').name}-{BEFORE}.gguf {out.name} {kind.upper()}'"
        )
    check_finite(model)
    plan = planned(model)
    rows = model.get_input_embeddings().weight.shape[0]
    parameters = sum(tensor.numel for tensor in plan.tensors)
    metadata, notes = metadata_of(model, rows, parameters)
    plan.metadata |= metadata
    plan.notes += notes
    first = kind if kind in TYPES else BEFORE
    _check_target(
        out, getattr(model, "name_or_path", ""), overwrite, size_of(plan, first) * (1 if kind == first else 2)
    )
    try:
        with replacing(out) as aside:
            with progress.stage(f"writing {out.name}"):
                if kind == first:
                    _write(aside, plan, model, kind, progress)
                else:
                    _quantised_by_llama_cpp(aside, plan, model, kind, progress)
            _tell(progress, plan, kind, aside)
            with progress.stage("proof"):
                progress.note(prove(aside, model, kind))
        _write_modelfile(out, model, plan, overwrite, progress)
    except ArtefactError:
        raise
    except OSError as error:
        raise ArtefactError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
    return out


def _write(path: Path, plan: Plan, model: Any, kind: str, progress: Progress) -> None:
    with torch.inference_mode():
        written = write(path, plan, model, kind, progress)
    if written.rounded:
        plan.notes.append(f"{written.rounded:,} scales of packed weights are rounded to float16")
    types = ", ".join(f"{count} in {name.lower()}" for name, count in written.types.items())
    plan.notes.append(f"tensors: {types}")


def _quantised_by_llama_cpp(path: Path, plan: Plan, model: Any, kind: str, progress: Progress) -> None:
    """Write a file of floats, and let llama.cpp write ``path`` from it."""
    floats = path.with_name(f"{path.name}.{BEFORE}")
    try:
        _write(floats, plan, model, BEFORE, progress)
        quantize(floats, path, BY_LLAMA_CPP[kind], torch.get_num_threads())
    finally:
        floats.unlink(missing_ok=True)


def _tell(progress: Progress, plan: Plan, kind: str, path: Path) -> None:
    size = human_bytes(path.stat().st_size)
    progress.note(f"architecture {plan.architecture}, {plan.metadata['.block_count']} layers, {kind}, {size}")
    for note in plan.notes:
        progress.note(note)


def _check_target(out: Path, source: str, overwrite: bool, need: int) -> None:
    if out.suffix != ".gguf":
        raise ArtefactError(f"a GGUF file is written to a path that ends in .gguf; not {str(out)!r}")
    if out.is_dir():
        raise ArtefactError(f"{str(out)!r} is a folder; name a file")
    if out.exists() and source and Path(source).exists() and out.samefile(source):
        raise ArtefactError(f"{str(out)!r} is the model itself; name another file")
    if out.exists() and not overwrite:
        raise ArtefactError(f"{str(out)!r} exists; pass overwrite (--overwrite) or name another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise ArtefactError(f"cannot write into {str(out.parent)!r}: {error.strerror or error}") from error
    if free < need * 1.02:
        raise ArtefactError(f"{str(out.parent)!r} has {human_bytes(free)} free, but the file needs {human_bytes(need)}")


def _write_modelfile(out: Path, model: Any, plan: Plan, overwrite: bool, progress: Progress) -> None:
    """Write the Modelfile; an existing one stays, unless it may be overwritten."""
    path = out.with_name(MODELFILE)
    if path.exists() and not overwrite:
        progress.note(f"{str(path)!r} exists and stays as it is")
        return
    try:
        tokenizer = tokenizer_of(model)
    except ArtefactError:
        tokenizer = None
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    adds = bool(plan.metadata.get("tokenizer.ggml.add_bos_token", False))
    source = getattr(model, "name_or_path", None)
    folder = Path(source) if source and Path(source).is_dir() else None
    text, notes = modelfile(out.name, tokenizer, ends, plan.metadata[".context_length"], folder, adds)
    write_text(path, text)
    for note in notes:
        progress.note(note)
