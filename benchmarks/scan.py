"""The scans of pliant on a CPU next to those of transformers, in turn: whole prompts, gradients, and decode steps.

    python benchmarks/scan.py [--threads 1] [--repeats 15] [--mamba2 1,512,24,64,1,128,256 …] [--mamba 1,512,1536,16 …]

Sizes are batch, tokens, heads, width of a head, groups, state and the model's chunk for Mamba-2; batch, tokens,
channels and state for Mamba-1. Every round runs both functions once; figures are percentiles over the rounds.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

import pliant  # noqa: F401
from machine import save

MAMBA2 = (
    *("1,9,8,8,2,10,8", "4,24,8,8,2,10,8", "8,128,8,8,2,10,8", "4,256,4,32,1,16,32"),  # test models, small models
    *("1,64,24,64,1,64,256", "1,256,24,64,1,64,256", "4,256,24,64,1,64,256"),  # a hybrid of 135 M parameters
    *("1,512,24,64,1,128,256", "1,2048,24,64,1,128,256", "1,512,80,64,1,128,256"),  # mamba2-130m and mamba2-2.7b
)
MAMBA = ("1,9,64,6", "4,24,64,6", "8,64,64,6", "1,64,1536,16", "1,512,1536,16", "4,128,1536,16", "1,256,8192,16")
MOST = 64 * 2**20  # elements of all states under gradients: transformers keeps several times as many

Call = Callable[[Callable[..., Any]], tuple[torch.Tensor, ...]]


def mamba2(sizes: tuple[int, ...]) -> dict[str, tuple[str, Call]]:
    """What is timed at these sizes: name -> function, and a call of it that returns outputs, states and gradients."""
    batch, tokens, heads, width, groups, state, chunk = sizes
    inputs = [torch.randn(batch, tokens, heads, width), torch.randn(batch, tokens, heads)]
    rates, skip, bias = -torch.rand(heads) * 4, torch.randn(heads), torch.randn(heads)
    shared = [torch.randn(batch, tokens, groups, state) for _ in range(2)]
    named = {"D": skip, "dt_bias": bias, "dt_softplus": True, "chunk_size": chunk, "return_final_states": True}
    kept = torch.randn(batch, heads, width, state)

    def step(function: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        now = kept.clone()
        output = function(
            now,
            inputs[0][:, 0],
            inputs[1][:, 0, :, None].expand(-1, -1, width),
            rates[:, None, None].expand(-1, width, state),
            *(tensor[:, 0] for tensor in shared),
            skip[:, None].expand(-1, width),
            dt_bias=bias[:, None].expand(-1, width),
            dt_softplus=True,
        )
        return output, now

    calls = calls_of([*inputs, rates, *shared], named)
    timed = {name: ("mamba2_chunk_scan", call) for name, call in calls.items()}
    return timed | {"step": ("mamba2_selective_state_update", without_gradients(step))}


def mamba(sizes: tuple[int, ...]) -> dict[str, tuple[str, Call]]:
    batch, tokens, channels, state = sizes
    inputs = [torch.randn(batch, channels, tokens) for _ in range(2)]
    shared = [torch.randn(batch, state, tokens) for _ in range(2)]
    named = {"D": torch.randn(channels), "z": torch.randn(batch, channels, tokens), "delta_softplus": True}
    named |= {"delta_bias": torch.randn(channels), "return_last_state": True}
    calls = calls_of([*inputs, -torch.rand(channels, state) * state, *shared], named)
    if batch * tokens * channels * state > MOST:
        del calls["gradients"]
    return {name: ("mamba_selective_scan", call) for name, call in calls.items()}


def calls_of(given: list[torch.Tensor], named: dict[str, Any]) -> dict[str, Call]:
    def gradients(function: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        output, state = function(*leaves, **named)
        return output, state, *torch.autograd.grad(output.square().sum() + state.square().sum(), leaves)

    return {"scan": without_gradients(lambda function: function(*given, **named)), "gradients": gradients}


def without_gradients(call: Call) -> Call:
    def run(function: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return call(function)

    return run


def compare(family: str, name: str, call: Call, repeats: int) -> dict[str, Any]:
    """Milliseconds of both functions, their ratio in each round, and the largest difference of a result to that of
    transformers, as a share of its largest element."""
    ours = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    functions = {"pliant": ours, "transformers": ours.__wrapped__}
    pairs = zip(*(call(function) for function in functions.values()), strict=True)
    apart = max(((mine - other).abs().max() / other.abs().max()).item() for mine, other in pairs)
    taken: dict[str, list[float]] = {who: [] for who in functions}
    for _ in range(repeats):
        for who, function in functions.items():
            began = time.perf_counter()
            call(function)
            taken[who].append((time.perf_counter() - began) * 1e3)
    ratios = np.array(taken["transformers"]) / np.array(taken["pliant"])
    found = {who: percentiles(values) for who, values in taken.items()}
    return {**found, "speedup": percentiles(ratios), "relative_difference": apart}


def percentiles(values: Any) -> dict[str, float]:
    return dict(zip(("p10", "median", "p90"), np.percentile(values, [10, 50, 90]).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--mamba2", nargs="*", default=MAMBA2)
    parser.add_argument("--mamba", nargs="*", default=MAMBA)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = []
    for family, timed in (("mamba2", mamba2), ("mamba", mamba)):
        for sizes in getattr(arguments, family):
            for what, (name, call) in timed(tuple(map(int, sizes.split(",")))).items():
                row = compare(family, name, call, arguments.repeats)
                rows.append({"family": family, "sizes": sizes, "timed": what, **row})
                print(
                    f"{family} {sizes} {what}: {row['speedup']['median']:.2f}x, {row['relative_difference']:.1e} apart"
                )
            save("scan", {"threads": arguments.threads, "repeats": arguments.repeats, "rows": rows})


if __name__ == "__main__":
    main()
