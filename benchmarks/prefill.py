"""Prompts of several lengths: packed weights next to torch and llama.cpp, in turn.

    python benchmarks/prefill.py --model build/demo/parts/smollm2-135m --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --out benchmarks/results/prefill.json

Tokens per second of a prompt that is read at once: medians over rounds with 10th and 90th percentiles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pliant
from decode import PACKED, LlamaCpp, packed, spread
from machine import machine
from pliant.runtime import library


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dense = pliant.load(arguments.model, dtype="float32")
    models = {
        "torch float32": dense,
        "int8": packed(dense, *PACKED["int8"]),
        "bf16": packed(dense, *PACKED["bf16"]),
        "int4, groups of 32": packed(dense, *PACKED["int4, groups of 32"]),
    }

    @torch.inference_mode()
    def ours(model: Any, ids: list[int]) -> None:
        model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    candidates: dict[str, Callable[[list[int]], None]] = {
        name: lambda ids, model=model: ours(model, ids) for name, model in models.items()
    }
    if arguments.gguf is not None:
        for name, kind in LlamaCpp.TYPES:
            other = LlamaCpp(arguments.gguf, kind, torch.get_num_threads()).model

            def theirs(ids: list[int], other: Any = other) -> None:
                other.reset()
                other.eval(ids)

            candidates[name] = theirs
    result: dict[str, Any] = {**machine(), "kernels": library.state(), "rounds": arguments.rounds, "lengths": {}}
    for length in arguments.lengths:
        ids = np.random.default_rng(0).integers(100, 4000, length).tolist()
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for round_ in range(arguments.rounds + 1):
            for name, run in candidates.items():
                began = time.perf_counter()
                run(ids)
                if round_:
                    rates[name].append(length / (time.perf_counter() - began))
        result["lengths"][length] = {name: spread(values) for name, values in rates.items()}
        print(length, {name: round(row["median"]) for name, row in result["lengths"][length].items()}, flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
