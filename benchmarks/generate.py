"""What ``generate`` takes beside the model: packed int8 weights, with torch held to one thread meanwhile and without.

    python benchmarks/generate.py --model build/demo/parts/smollm2-135m --out benchmarks/results/generate.json

Milliseconds of a token after a prompt of 32, in turn: medians over rounds with 10th and 90th percentiles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteriaList

import pliant
from decode import PACKED, packed, spread
from machine import machine
from pliant.compat.cache_argument import cache_argument
from pliant.runtime import library

PROMPT, TOKENS, ROUNDS = 32, 64, 15


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = packed(pliant.load(arguments.model, dtype="float32"), *PACKED["int8"])
    model.generation_config.eos_token_id = None
    ids = torch.arange(100, 100 + PROMPT)[None]

    @torch.inference_mode()
    def loop() -> None:
        cache, given = cache_argument(model, DynamicCache(config=model.config)), ids
        for _ in range(TOKENS):
            out = model(input_ids=given, **cache, use_cache=True, logits_to_keep=1)
            given = out.logits[:, -1:].argmax(-1)

    def generate(of: Any, **settings: Any) -> Callable[[], None]:
        return lambda: of(input_ids=ids, max_new_tokens=TOKENS, pad_token_id=0, **settings)

    def never(given: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(len(given), dtype=torch.bool)

    as_it_comes = type(model).generate.__get__(model)
    candidates = {
        "the model in a loop": loop,
        "generate, greedy": generate(model.generate, do_sample=False),
        "generate, greedy, torch on all threads": generate(as_it_comes, do_sample=False),
        "generate, greedy, a stopping criterion": generate(
            model.generate, do_sample=False, stopping_criteria=StoppingCriteriaList([never])
        ),
        "generate, sampled": generate(model.generate, do_sample=True),
        "generate, sampled, torch on all threads": generate(as_it_comes, do_sample=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(ROUNDS + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if round_:
                seconds[name].append(1e3 * (time.perf_counter() - began) / TOKENS)
    rows = {name: spread(values) for name, values in seconds.items()}
    result = {**machine(), "kernels": library.state(), "prompt": PROMPT, "tokens": TOKENS, "rounds": ROUNDS}
    arguments.out.write_text(json.dumps(result | {"ms_a_token": rows}, indent=1) + "\n")
    print({name: round(row["median"], 2) for name, row in rows.items()})


if __name__ == "__main__":
    main()
