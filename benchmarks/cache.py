"""Keys and values in blocks: what packing and zeroing them saves, and what it costs.

    python benchmarks/cache.py --model build/demo/parts/smollm2-135m --text wikipedia.txt \\
        --out benchmarks/results/cache.json

A context is read at once, attending to itself as it is, and then kept in every way. For every length and way: bytes of
the cache, milliseconds of attention and of a whole token (int8 weights), perplexity of the text that follows the
context, and whether a five-digit number from anywhere in the context is told when it is asked for. ``float32`` keeps
everything as it comes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import pliant
from machine import machine
from pliant.checkpoint.load import tokenizer_of
from pliant.compat.cache_argument import cache_argument
from pliant.compat.native import plan_of
from pliant.runtime import library

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"format": "float32"},
    "bf16": {"format": "bf16"},
    "int8": {"format": "int8"},
    **{
        f"{form}, {keys:.0%} of keys and {values:.0%} of values zeroed": {
            "format": form,
            "key_sparsity": keys,
            "value_sparsity": values,
        }
        for form, keys, values in (
            ("bf16", 0.3, 0.5),
            ("bf16", 0.5, 0.5),
            ("bf16", 0.5, 0.7),
            ("bf16", 0.7, 0.7),
            ("int8", 0.3, 0.5),
            ("int8", 0.5, 0.7),
        )
    },
}
AHEAD = 64  # tokens predicted after the context


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a context, layer by layer."""
    cache = pliant.BlockCache(model.config, format="float32")
    model(input_ids=ids, **cache_argument(model, cache), logits_to_keep=1)
    return [layer.read() for layer in cache.layers]


def kept(model: Any, states: list[tuple[torch.Tensor, torch.Tensor]], settings: dict[str, Any]) -> Any:
    """They as a cache keeps them."""
    cache = pliant.BlockCache(model.config, **settings)
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        layer.append(keys, values)
    return cache


@torch.inference_mode()
def step_by_step(model: Any, cache: Any, ids: torch.Tensor) -> tuple[float, float, float]:
    """Mean loss of ids after the first, milliseconds of attention and of everything, a token."""
    plan: Any = plan_of(model.base_model)
    decoder = plan.decoder
    decoder.spent[0] = decoder.spent[1] = 0
    loss = 0.0
    began = time.perf_counter()
    for at in range(ids.shape[1] - 1):
        logits = model(input_ids=ids[:, at : at + 1], **cache_argument(model, cache)).logits[0, -1].float()
        loss -= float(logits.log_softmax(-1)[ids[0, at + 1]])
    steps = ids.shape[1] - 1
    return loss / steps, decoder.spent[1] / 1e6 / steps, 1e3 * (time.perf_counter() - began) / steps


def hidden(tokenizer: Any, filler: torch.Tensor, draw: random.Random) -> tuple[str, torch.Tensor]:
    """A number, and the filler with that number somewhere in it."""
    number = str(draw.randrange(10_000, 100_000))
    needle = encoded(tokenizer, f" The pass key is {number}. Remember it: {number} is the pass key. ")
    at = draw.randrange(filler.shape[1])
    return number, torch.cat([filler[:, :at], needle, filler[:, at:]], 1)


def encoded(tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def tells(model: Any, tokenizer: Any, number: str, cache: Any) -> bool:
    """Whether the number is the likeliest answer at the end."""
    told, ids = "", encoded(tokenizer, " What is the pass key? The pass key is ")
    for _ in range(8):
        logits = model(input_ids=ids, **cache_argument(model, cache), logits_to_keep=1).logits[0, -1]
        ids = logits.argmax().view(1, 1)
        told += tokenizer.decode(ids[0])
    return number in told.replace(" ", "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 4096, 8000])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = pliant.load(arguments.model, dtype="float32")
    tokenizer = tokenizer_of(model)
    pliant.apply(model, pliant.PackedLinear(format="int8"), progress=False)
    ids = tokenizer(arguments.text.read_text("utf-8"), return_tensors="pt")["input_ids"]
    result: dict[str, Any] = {**machine(), "kernels": library.state(), "ahead": AHEAD, "rows": []}
    for context in arguments.contexts:
        need = context + AHEAD + 1
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in SETTINGS}
        told: dict[str, list[bool]] = {name: [] for name in SETTINGS}
        size = {}
        for i in range(arguments.texts):
            start = i * (ids.shape[1] - need) // max(1, arguments.texts - 1)
            window = ids[:, start : start + need]
            states = read(model, window[:, :context])
            for name, settings in SETTINGS.items():
                cache = kept(model, states, settings)
                size[name] = cache.bytes()
                found[name].append(step_by_step(model, cache, window[:, context:]))
        draw = random.Random(0)
        for _ in range(arguments.needles):
            filler = ids[:, draw.randrange(ids.shape[1] - context) :][:, : context - 64]
            number, haystack = hidden(tokenizer, filler, draw)
            states = read(model, haystack)
            for name, settings in SETTINGS.items():
                told[name].append(tells(model, tokenizer, number, kept(model, states, settings)))
        for name in SETTINGS:
            losses, attention, whole = zip(*found[name], strict=True)
            row = {
                "context": context,
                "cache": name,
                "bytes": size[name],
                "perplexity": math.exp(statistics.mean(losses)),
                "attention_ms": statistics.median(attention),
                "token_ms": statistics.median(whole),
                "told": sum(told[name]),
                "asked": len(told[name]),
            }
            result["rows"].append(row)
            print(row, flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
