"""Time a model on this machine: prefill and decode, alternating with another model."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from pliant.checkpoint.load import loaded
from pliant.compat.cache_argument import cache_argument
from pliant.device import wait
from pliant.errors import DataError
from pliant.forward.windows import check_model, check_room, longest_of
from pliant.progress import peak_memory
from pliant.runtime.llama_model import LlamaModel

PROMPT = 256
"""Default number of tokens in a prompt."""


def bench(
    model: Any,
    against: Any = None,
    *,
    prompt: int | None = None,
    tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    seed: int = 0,
    dtype: Any = None,
    device: Any = None,
) -> dict[str, Any]:
    """Time prefill and decode on random tokens; with ``against``, both models in turn, A B A B …

    Arguments:
        model, against: transformers models, timed on their devices; or what :func:`pliant.load` takes.
        prompt: tokens in the prompt; default: 256, or as many as the models have positions for.
        tokens: tokens decoded after it, one at a time, with the key-value cache.
        batch: sequences in a batch.
        repeats: timed rounds, after one untimed round.
        dtype, device: of models that are given by name or folder, as in :func:`pliant.load`.

    Returns:
        For ``model`` (and ``against``): ``prefill`` and ``decode`` in tokens per second as ``median``, ``p10``,
        ``p90``; ``speedup`` as the median over rounds of model/against; ``peak_memory`` of the process in bytes;
        ``settings``: the values used for the arguments; ``on``: device and dtype of each model.

    Raises:
        ArchitectureError: a model that predicts no next tokens.
        DataError: a setting below 1, or more tokens than a model has positions for.
    """
    for name, value in {"prompt": prompt, "tokens": tokens, "batch": batch, "repeats": repeats}.items():
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1; not {value}")
    sources = {"model": model, **({"against": against} if against is not None else {})}
    models = {name: loaded(source, dtype=dtype, device=device) for name, source in sources.items()}
    prompt = prompt_for(models, prompt, tokens)
    rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    generator = torch.Generator().manual_seed(seed)
    configs = {name: timed.config.get_text_config(decoder=True) for name, timed in models.items()}
    was_training = {name: timed.training for name, timed in models.items()}
    for timed in models.values():
        timed.eval()
    try:
        for round_ in range(repeats + 1):
            for name, timed in models.items():
                ids = torch.randint(configs[name].vocab_size, (batch, prompt), generator=generator)
                clock = timed.seconds if isinstance(timed, LlamaModel) else partial(_once, timed)
                prefill, decode = clock(ids.to(timed.device), tokens)
                if round_:
                    rates[name]["prefill"].append(batch * prompt / prefill)
                    rates[name]["decode"].append(batch * tokens / decode)
    finally:
        for name, timed in models.items():
            timed.train(was_training[name])
    result: dict[str, Any] = {name: {k: _spread(v) for k, v in pair.items()} for name, pair in rates.items()}
    if against is not None:
        result["speedup"] = {
            kind: _spread([a / b for a, b in zip(rates["model"][kind], rates["against"][kind], strict=True)])
            for kind in ("prefill", "decode")
        }
    result["settings"] = {"prompt": prompt, "tokens": tokens, "batch": batch, "repeats": repeats}
    result["on"] = {
        name: {"device": str(timed.device), "dtype": str(timed.dtype).removeprefix("torch.")}
        if not isinstance(timed, LlamaModel)
        else {"device": str(timed.device), "runtime": timed.runtime}
        for name, timed in models.items()
    }
    result["threads"] = torch.get_num_threads()
    result["peak_memory"] = peak_memory()
    return result


def prompt_for(models: Mapping[str, Any], prompt: int | None, tokens: int, usual: int = PROMPT) -> int:
    """Length of a prompt before ``tokens`` tokens: ``prompt``, or by default the smaller of ``usual`` and all models'
    positions.

    Raises:
        ArchitectureError: a model that predicts no next tokens.
        DataError: more tokens than a model has positions for.
    """
    for model in models.values():
        check_model(model)
    prompt = prompt or max(1, min(usual, *(longest_of(model) - tokens for model in models.values())))
    for name, model in models.items():
        check_room(model, prompt, tokens, name)
    return prompt


@torch.inference_mode()
def _once(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of ``tokens`` decoding steps after it."""
    gc.collect()
    cache = cache_argument(model, new_cache(model))
    wait(model.device)
    began = time.perf_counter()
    out = model(input_ids=ids, **cache, use_cache=True, logits_to_keep=1)
    wait(model.device)
    middle = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), **cache, use_cache=True)
    wait(model.device)
    return middle - began, time.perf_counter() - middle


def new_cache(model: Any) -> Any:
    """An empty cache of the type that ``generate`` uses."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}
