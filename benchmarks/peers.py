"""The same job with other tools: quality at equal parameters, time, and the lines that a user writes.

    pip install torch-pruning
    python benchmarks/peers.py --smollm2 DIR --calibration calibration.jsonl --held-out held-out.jsonl

Each function below is what a user writes once model and calibration windows are there. Nothing is trained.
Torch-Pruning narrows the MLPs by the size of their weights or by first-order Taylor; ShortGPT drops the layers that
change the stream least. Rows that results/peers.json has are kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

import pliant
from machine import RESULTS, save
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


def torch_pruning(model: Any, windows: torch.Tensor, ratio: float, **how: Any) -> Any:
    import torch_pruning as tp

    others = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head")) and "mlp.gate" not in name]
    others = [m for m in others if m not in [layer.mlp.up_proj for layer in model.model.layers]]
    mlp = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    return tp.pruner.BasePruner(
        model,
        example_inputs=windows[:1, :16],
        pruning_ratio=ratio * model.num_parameters() / mlp,
        ignored_layers=others,
        forward_fn=lambda m, x: m(x, use_cache=False).logits,
        **how,
    )


def torch_pruning_magnitude(model: Any, windows: torch.Tensor, ratio: float) -> None:
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    torch_pruning(model, windows, ratio, importance=GroupMagnitudeImportance(p=1)).step()


def torch_pruning_taylor(model: Any, windows: torch.Tensor, ratio: float) -> None:
    from torch_pruning.pruner.importance import GroupTaylorImportance

    pruner = torch_pruning(model, windows, ratio, importance=GroupTaylorImportance(), global_pruning=True)
    for window in windows:
        model(window[None], labels=window[None], use_cache=False).loss.backward()
    pruner.step()
    model.zero_grad()


def pliant_shortgpt(model: Any, text: Any, ratio: float) -> None:
    pliant.apply(
        model, pliant.OneShot(by="influence", granularity="layer", ratio=ratio, samples=SAMPLES, seqlen=SEQLEN), text
    )


def pliant_fisher(model: Any, text: Any, ratio: float) -> None:
    pliant.apply(model, pliant.FisherPruner(ratio=ratio, samples=SAMPLES, seqlen=SEQLEN), text)


def pliant_fisher_repaired(model: Any, text: Any, ratio: float) -> None:
    pliant.apply(model, pliant.FisherPruner(ratio=ratio, samples=SAMPLES, seqlen=SEQLEN, repair=64), text)


Method = Callable[[Any, Any, float], None]
PEERS: tuple[Method, ...] = (shortgpt, torch_pruning_magnitude, torch_pruning_taylor)
OURS: tuple[Method, ...] = (pliant_shortgpt, pliant_fisher, pliant_fisher_repaired)
CALLED = {torch_pruning_magnitude: torch_pruning, torch_pruning_taylor: torch_pruning}  # what a user writes for it, too


def lines(method: Method) -> int:
    """Lines without signatures, as the formatter leaves them."""
    written = [method, CALLED[method]] if method in CALLED else [method]
    return sum(len([line for line in inspect.getsource(f).splitlines()[1:] if line.strip()]) for f in written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    arguments = parser.parse_args()
    text = pliant.text(arguments.calibration)
    path = RESULTS / "peers.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["method"], row["asked"]) for row in rows}
    for ratio in RATIOS:
        for method in (*PEERS, *OURS):
            if (method.__name__, ratio) in done:
                continue
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
            except Exception as error:  # a peer that does not run is a result, too; one that is not there is none
                if method in OURS or isinstance(error, ImportError):
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
