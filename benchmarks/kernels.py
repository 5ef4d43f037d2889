"""Packed matrices times a few rows: fractions of what memory gives, and against torch's own ops, in one process, in
turn.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

Every matrix is read out of memory: copies of it, more than the caches hold, take turns. Microseconds are the 10th
percentile and the median over rounds; GB/s are packed bytes over the 10th percentile. ``stream_gb_s`` is what the same
threads do that only read, in three places at once each.
"""

from __future__ import annotations

import argparse
import ctypes
import json
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
from pliant.runtime.packed_matrix import FORMATS, pack, room

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 8192), (576, 1536))
COLD = 160 << 20
ROUNDS = 15


def copies(make: Callable[[], Any], size: int) -> list[Any]:
    return [make() for _ in range(max(3, -(-COLD // size)))]


def own(weight: torch.Tensor, format: str, sparse: bool) -> tuple[list[Callable[[torch.Tensor], Any]], int]:
    packed = pack(weight, format, sparse=sparse)
    rows = weight.shape[0]
    held = copies(lambda: room(packed.numel()).copy_(packed), packed.numel())
    return [lambda x, one=one: linear(x, one, None, rows) for one in held], packed.numel()


def torchs(weight: torch.Tensor) -> dict[str, tuple[list[Callable[[torch.Tensor], Any]], int]]:
    """torch's own: F.linear in two dtypes, prepacked where it can be, and its low-bit ops."""
    rows, columns = weight.shape
    found: dict[str, tuple[list[Callable[[torch.Tensor], Any]], int]] = {}
    wide = copies(weight.clone, weight.numel() * 4)
    found["torch F.linear float32"] = [lambda x, w=w: F.linear(x, w) for w in wide], weight.numel() * 4
    half = copies(weight.bfloat16().clone, weight.numel() * 2)
    found["torch F.linear bf16"] = [lambda x, w=w: F.linear(x.bfloat16(), w) for w in half], weight.numel() * 2
    for name, tensors, size in (("float32", wide, 4), ("bf16", half, 2)):
        try:
            ready = [torch.ops.mkldnn._reorder_linear_weight(w, 1) for w in tensors]
            run = torch.ops.mkldnn._linear_pointwise
            run(torch.zeros(1, columns, dtype=tensors[0].dtype), ready[0], None, "none", [], "")
        except RuntimeError:
            continue  # this processor lacks what it asks for
        found[f"torch prepacked {name}"] = (
            [lambda x, w=w, d=tensors[0].dtype, run=run: run(x.to(d), w, None, "none", [], "") for w in ready],
            weight.numel() * size,
        )
    codes = copies(lambda: torch.randint(-127, 128, (rows, columns), dtype=torch.int8), weight.numel())
    scale = torch.rand(rows).bfloat16()
    found["torch int8pack"] = (
        [lambda x, w=w: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), w, scale) for w in codes],
        weight.numel(),
    )
    fours = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (rows, columns), dtype=torch.int32), 1
    )
    both = torch.rand(columns // 128, rows, 2).bfloat16()
    packs = copies(fours.clone, weight.numel() // 2)
    found["torch int4pack, groups of 128"] = (
        [lambda x, w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), w, 128, both) for w in packs],
        weight.numel() // 2 + both.numel() * 2,
    )
    return found


def packing() -> dict[str, float]:
    """Seconds to pack the first shape, half of it zeros where zeros are left out: medians of all threads together."""
    weight = torch.randn(SHAPES[0]) * 0.02
    zeroed = weight * (torch.rand(SHAPES[0]) >= 0.5)
    found = {}
    for format in FORMATS:
        for name, w, sparse in ((format, weight, False), (f"{format}, 50% zeros", zeroed, True)):
            seconds = []
            for _ in range(9):
                began = time.perf_counter()
                pack(w, format, sparse=sparse)
                seconds.append(time.perf_counter() - began)
            found[name] = float(np.median(seconds))
    return found


TYPES = {"ggml bf16": 30, "ggml q8_0": 8, "ggml q4_0": 2}


class Ggml:
    """ggml's matrix product from llama-cpp-python's library, where that is installed."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t

        class Init(ctypes.Structure):
            _fields_ = (("size", size), ("buffer", pointer), ("no_alloc", ctypes.c_bool))

        self.Init = Init
        for name, result, arguments in (
            ("ggml_init", pointer, [Init]),
            ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
            ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_get_data", pointer, [pointer]),
            ("ggml_nbytes", size, [pointer]),
            ("ggml_free", None, [pointer]),
        ):
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
        self.compute = self.cpu.ggml_graph_compute_with_ctx
        self.compute.restype, self.compute.argtypes = ctypes.c_int, [pointer, pointer, ctypes.c_int]
        self.cpu.ggml_cpu_init()
        self.contexts: list[int] = []

    def products(self, rows: int, columns: int, kind: int, batch: int, threads: int) -> tuple[list[Any], int]:
        size = rows * columns * 2 + batch * (rows + columns) * 4 + (64 << 20)
        made, bytes_ = [], 0
        while sum(m[2] for m in made) < COLD or len(made) < 3:
            context = self.base.ggml_init(self.Init(size, None, False))
            w = self.base.ggml_new_tensor_2d(context, kind, columns, rows)
            x = self.base.ggml_new_tensor_2d(context, 0, columns, batch)
            bytes_ = self.base.ggml_nbytes(w)
            ctypes.memset(self.base.ggml_get_data(w), 17, bytes_)
            ctypes.memset(self.base.ggml_get_data(x), 0, columns * batch * 4)
            graph = self.base.ggml_new_graph(context)
            self.base.ggml_build_forward_expand(graph, self.base.ggml_mul_mat(context, w, x))
            made.append((context, graph, bytes_))
            self.contexts.append(context)
        return [lambda _, c=c, g=g: self.compute(c, g, threads) for c, g, _ in made], bytes_

    def clear(self) -> None:
        while self.contexts:
            self.base.ggml_free(self.contexts.pop())


def timed(calls: dict[str, tuple[list[Callable[[torch.Tensor], Any]], int]], x: torch.Tensor) -> dict[str, Any]:
    """Every candidate in turn, a round each; all of its copies in a round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):
        for name, (held, _) in calls.items():
            for call in held:
                began = time.perf_counter()
                call(x)
                if round_:
                    seconds[name].append(time.perf_counter() - began)
    found = {}
    for name, (_, size) in calls.items():
        low, median = np.percentile(seconds[name], [10, 50])
        found[name] = {"p10_us": low * 1e6, "median_us": median * 1e6, "bytes": size, "gb_s": size / low / 1e9}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="which of them, counted from 0"
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        ggml: Ggml | None = Ggml()
    except (ImportError, OSError, AttributeError):
        ggml = None
    result: dict[str, Any] = {
        **machine(),
        "kernels": library.state(),
        "rounds": ROUNDS,
        "packing_s": packing(),
        "rows": [],
    }
    print(result["packing_s"], flush=True)
    with torch.inference_mode():
        for rows, columns in (SHAPES[i] for i in arguments.shapes):
            weight = torch.randn(rows, columns) * 0.02
            order = torch.rand(rows, columns)
            ours = {}
            for format in FORMATS:
                ours[f"{format}"] = own(weight, format, False)
                for sparsity in (0.5, 0.7):
                    ours[f"{format}, {sparsity:.0%} zeros"] = own(weight * (order >= sparsity), format, True)
            theirs = torchs(weight)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for batch in arguments.rows:
                    x = torch.randn(batch, columns)
                    calls = {**ours, **theirs}
                    if ggml is not None:
                        for name, kind in TYPES.items():
                            calls[name] = ggml.products(rows, columns, kind, batch, threads)
                    found = timed(calls, x)
                    if ggml is not None:
                        ggml.clear()
                    stream = library.bandwidth(threads, 3 << 26) / 1e9
                    entry = {"shape": [rows, columns], "threads": threads, "batch": batch, "stream_gb_s": stream}
                    result["rows"].append({**entry, "times": found})
                    print(rows, columns, threads, batch, {k: round(v["p10_us"]) for k, v in found.items()}, flush=True)
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
