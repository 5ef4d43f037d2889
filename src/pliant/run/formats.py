"""Compare the packed formats of one model on this machine."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pliant.checkpoint.load import loaded, tokenizer_of
from pliant.checkpoint.packed_bytes import is_packed, packed_bytes
from pliant.errors import PackedError
from pliant.measure.quality.evaluate import evaluate
from pliant.measure.speed.bench import bench, prompt_for
from pliant.measure.speed.token_breakdown import token_time
from pliant.progress import Progress
from pliant.run.apply import apply
from pliant.runtime import library
from pliant.runtime.sparse_break_even import break_even
from pliant.values.pack import PackedLinear

FORMATS = {
    "bf16": {"format": "bf16", "head": "bf16"},
    "int8": {"format": "int8"},
    "int4, groups of 32": {"format": "int4", "group": 32},
    "int4, groups of 128": {"format": "int4"},
}
PROMPT = 128
SPLIT = 64  # tokens of the prompt, at most, when the parts of a token are timed
HARM = 1.02  # largest perplexity of a recommended format, relative to the original model


def compare_formats(
    model: Any,
    *,
    perplexity: Any = None,
    windows: int = 16,
    prompt: int | None = None,
    tokens: int = 32,
    repeats: int = 5,
    dtype: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack copies of a model in every format, and time each alternately with the original model.

    Arguments:
        model: a transformers model on the CPU, or a folder or name for :func:`pliant.load`.
        perplexity: text to measure quality on; without it bf16 and int8 are assumed to do no harm.
        windows: windows of that text at most.
        prompt, tokens, repeats: as in :func:`pliant.bench`; the default prompt has 128 tokens.
        dtype: of a model given by name or folder.

    Returns:
        ``formats``: name -> ``decode``, ``prefill`` (tokens per second), ``speedup`` of both over the original,
        ``bits`` of a weight, ``bytes`` of weights read per token, milliseconds per token as in ``token_time``,
        ``perplexity``, whether all layers run in one ``native`` call, and why not; ``break_even``: for each format, the
        sparsity from which leaving zeros out is faster (above 1: never); ``recommended``: a format, or the dtype of the
        original model.

    Raises:
        DataError: the prompt and the tokens exceed the model's positions.
        PackedError: the model is packed already.
    """
    model = loaded(model, dtype=dtype)
    if is_packed(model):
        raise PackedError("this model is packed already; give the model that it was packed from")
    progress = progress or Progress()
    prompt = prompt_for({"model": model}, prompt, tokens, usual=PROMPT)
    progress.note(f"  a prompt of {prompt} tokens, {tokens} decoded")
    tokenizer = tokenizer_of(model) if perplexity is not None else None

    def quality(of: Any) -> float | None:
        if perplexity is None:
            return None
        found = evaluate(of, perplexity=perplexity, tokenizer=tokenizer, windows=windows)["perplexity"]
        return next(iter(found.values()))["perplexity"]

    asis = str(model.dtype).removeprefix("torch.")
    rows: dict[str, dict[str, Any]] = {}
    with progress.stage("formats") as shown:
        rows[asis] = {
            "perplexity": quality(model),
            "split": token_time(model, prompt=min(prompt, SPLIT), tokens=tokens),
        }
        for done, (name, settings) in enumerate(FORMATS.items(), 1):
            shown.step(done / (len(FORMATS) + 1), name)
            packed = apply(copy.deepcopy(model), PackedLinear(**settings), progress=False)
            timed = bench(packed, model, prompt=prompt, tokens=tokens, repeats=repeats)
            rows[name] = {
                "decode": timed["model"]["decode"],
                "prefill": timed["model"]["prefill"],
                "speedup": timed["speedup"],
                "bits": packed.pliant_history[-1]["bits"],
                "bytes": packed_bytes(packed),
                "split": token_time(packed, prompt=min(prompt, SPLIT), tokens=tokens),
                **{key: packed.pliant_history[-1][key] for key in ("native", "why_not_native")},
                "perplexity": quality(packed),
            }
            rows[asis] |= {"decode": timed["against"]["decode"], "prefill": timed["against"]["prefill"]}
    return {
        "formats": rows,
        "break_even": {form: break_even(form) for form in ("bf16", "int8", "int4")},
        "recommended": _recommended(rows, asis),
        "settings": {"prompt": prompt, "tokens": tokens, "repeats": repeats},
        "kernels": library.state(),
        "threads": torch.get_num_threads(),
    }


def _recommended(rows: dict[str, dict[str, Any]], asis: str) -> str:
    """The fastest format in decoding among those that do no harm."""
    limit = rows[asis]["perplexity"]
    harmless = [
        name
        for name, row in rows.items()
        if name == asis or (not name.startswith("int4") if limit is None else row["perplexity"] <= HARM * limit)
    ]
    return max(harmless, key=lambda name: rows[name]["decode"]["median"])
