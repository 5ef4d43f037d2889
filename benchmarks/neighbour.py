"""A busy process beside: packed products on pliant's pool, torch's own on OpenMP, in turn, with as many threads as
cores.

    python benchmarks/neighbour.py --out benchmarks/results/neighbour.json

The neighbour computes without pause on one core. A pool whose threads wait for each other then waits for as long as the
neighbour keeps its core; pliant's caller takes over what no thread has begun.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from machine import machine
from pliant.runtime import library
from pliant.runtime.packed_linear import linear
from pliant.runtime.packed_matrix import pack

SIZE, CALLS, ROUNDS = 4096, 100, 5


def calls() -> dict[str, Callable[[torch.Tensor], Any]]:
    weight = torch.randn(SIZE, SIZE) * 0.02
    found: dict[str, Callable[[torch.Tensor], Any]] = {}
    for format in ("int8", "int4"):
        packed = pack(weight, format)
        found[f"pliant {format}"] = lambda x, packed=packed: linear(x, packed, None, SIZE)
    codes, scale = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8), torch.rand(SIZE).bfloat16()
    found["torch int8pack"] = lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), codes, scale)
    fours = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32), 1)
    both = torch.rand(SIZE // 128, SIZE, 2).bfloat16()
    found["torch int4pack, groups of 128"] = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.bfloat16(), fours, 128, both
    )
    found["torch F.linear float32"] = lambda x: F.linear(x, weight)
    return found


@torch.inference_mode()
def timed(candidates: dict[str, Callable[[torch.Tensor], Any]], threads: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    x = torch.randn(1, SIZE)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(ROUNDS + 1):
        for name, call in candidates.items():
            for _ in range(CALLS):
                began = time.perf_counter()
                call(x)
                if round_:
                    seconds[name].append(time.perf_counter() - began)
    return {
        name: dict(zip(("p10_us", "median_us", "p90_us"), np.percentile(all_, [10, 50, 90]) * 1e6, strict=True))
        for name, all_ in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cores, candidates = torch.get_num_threads(), calls()
    result: dict[str, Any] = {**machine(), "kernels": library.state(), "shape": [SIZE, SIZE], "times": {}}
    result["times"]["one thread, alone"] = timed(candidates, 1)
    result["times"]["all threads, alone"] = timed(candidates, cores)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1)
        result["times"]["all threads, a busy process beside"] = timed(candidates, cores)
    finally:
        neighbour.kill()
    for setting, times in result["times"].items():
        print(setting, {name: round(row["median_us"]) for name, row in times.items()})
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
