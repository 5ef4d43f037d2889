"""The same job with other tools: quality at equal parameters, time, and the lines that a user writes.

    pip install torch-pruning
    python benchmarks/peers.py --smollm2 DIR --calibration calibration.jsonl --held-out held-out.jsonl

Each function below is what a user writes once model and calibration windows are there. Nothing is trained. Torch-Pruning narrows
the MLPs by the size of their weights or by first-order Taylor; ShortGPT drops the layers that change the stream least.
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

import pliant
from machine import save
from pliant.checkpoint.load import tokenizer_of

SAMPLES, SEQLEN = 24, 256
RATIOS = (0.1, 0.2)


def shortgpt(model: Any, windows: torch.Tensor, ratio: float) -> None:
    with torch.inference_mode():
        hidden = model(windows, output_hidden_states=True).hidden_states
    changes = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(hidden)]
    layers, drop, removed = model.model.layers, [], 0
    for index in sorted(range(len(changes)), key=lambda i: changes[i]):
        if removed / model.num_parameters() >= ratio:
            break
        drop.append(index)
        removed += sum(p.numel() for p in layers[index].parameters())
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in drop)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)


def torch_pruning_magnitude(model: Any, windows: torch.Tensor, ratio: float) -> None:
    import torch_pruning as tp

    others = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head")) and "mlp.gate" not in name]
    others = [m for m in others if m not in [layer.mlp.up_proj for layer in model.model.layers]]
    mlp = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=windows[:1, :16],
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio * model.num_parameters() / mlp,
        ignored_layers=others,
        forward_fn=lambda m, x: m(x, use_cache=False).logits,
    )
    pruner.step()


def torch_pruning_taylor(model: Any, windows: torch.Tensor, ratio: float) -> None:
    import torch_pruning as tp

    others = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head")) and "mlp.gate" not in name]
    others = [m for m in others if m not in [layer.mlp.up_proj for layer in model.model.layers]]
    mlp = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=windows[:1, :16],
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio * model.num_parameters() / mlp,
        ignored_layers=others,
        forward_fn=lambda m, x: m(x, use_cache=False).logits,
    )
    for window in windows:
        model(window[None], labels=window[None], use_cache=False).loss.backward()
    pruner.step()
    model.zero_grad()


def pliant_shortgpt(model: Any, text: Any, ratio: float) -> None:
    pliant.apply(
        model, pliant.OneShot(by="influence", granularity="layer", ratio=ratio, samples=SAMPLES, seqlen=SEQLEN), text
    )


def pliant_multipruner_repaired(model: Any, text: Any, ratio: float) -> None:
    pliant.apply(
        model, pliant.MultiPruner(ratio=ratio, samples=SAMPLES, width_samples=16, seqlen=SEQLEN, repair=64), text
    )


PEERS: tuple[Callable[[Any, torch.Tensor, float], None], ...] = (
    shortgpt,
    torch_pruning_magnitude,
    torch_pruning_taylor,
)
OURS: tuple[Callable[[Any, Any, float], None], ...] = (pliant_shortgpt, pliant_multipruner_repaired)


def lines(function: Callable[..., None]) -> int:
    """Statements that are not the signature, one a line as the formatter leaves them."""
    return len([line for line in inspect.getsource(function).splitlines()[1:] if line.strip()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    arguments = parser.parse_args()
    text = pliant.text(arguments.calibration)
    rows = []
    for ratio in RATIOS:
        for method in (*PEERS, *OURS):
            model = pliant.load(arguments.smollm2)
            dense = model.num_parameters()
            tokenizer = tokenizer_of(model)
            given = text if method in OURS else text.sample(SAMPLES, 42).windows(tokenizer, SEQLEN)
            began = time.perf_counter()
            row = {"method": method.__name__, "asked": ratio, "lines": lines(method)}
            try:
                method(model, given, ratio)
                row["seconds"] = time.perf_counter() - began
                row["ratio"] = 1 - model.num_parameters() / dense
                found = pliant.evaluate(
                    model, perplexity=arguments.held_out, tokenizer=tokenizer, seqlen=SEQLEN, windows=40
                )
                (row["quality"],) = found["perplexity"].values()
            except Exception as error:  # a peer that does not run is a result, too
                if method in OURS:
                    raise
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            quality = row.get("quality", {}).get("perplexity", math.nan)
            print(row["method"], ratio, f"{quality:.2f}", {k: v for k, v in row.items() if k != "quality"}, flush=True)
            save("peers", {"rows": rows, "torch_pruning": tp_version()})


def tp_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
