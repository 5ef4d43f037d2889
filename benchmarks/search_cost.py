"""What a greedy search costs: naive, exact and lazy on the same calibration windows, in one run.

    python benchmarks/search_cost.py --smollm2 DIR --text calibration.jsonl [--stories DIR]

Removes 8 blocks from SmolLM2-135M, 4 from stories260K and 8 from a random 48-layer model, with each mode in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import pliant
from machine import save
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet
from pliant.forward.windows import windows_for
from pliant.measure.prefix_scorer import PrefixScorer
from pliant.prune import block_moves
from pliant.searches import Greedy

MODES = {
    "lazy": {"mode": "lazy"},
    "lazy, slack 0.5": {"mode": "lazy", "slack": 0.5},
    "exact": {"mode": "exact"},
    "naive": {"mode": "naive"},
}


def search(model, windows: torch.Tensor, settings: dict, removals: int) -> dict:
    anatomy = anatomy_of(model)
    walk = PrefixScorer(model, anatomy, windows, reuse=settings["mode"] != "naive")
    steps: list[dict] = []

    began = time.perf_counter()
    greedy = Greedy(Subnet(), block_moves(anatomy), lambda subnet: len(subnet.skip) < removals, **settings)
    while not greedy.done:
        for candidate in greedy.ask():
            greedy.tell(candidate, [walk.score(candidate)])
        for move, loss in greedy.taken[len(steps) :]:
            walk.rebase(move.subnet)
            row = {"block": move.unit, "loss": loss, "perplexity": math.exp(loss), "evaluations": walk.evaluations}
            steps.append(row)
    seconds = time.perf_counter() - began
    walk.close()
    return {
        "evaluations": walk.evaluations,
        "block_forwards": walk.block_forwards,
        "seconds": seconds,
        "steps": steps,
    }


def compare(name: str, model, windows: torch.Tensor, removals: int) -> dict:
    anatomy = anatomy_of(model)
    rows = {}
    for mode, settings in MODES.items():
        rows[mode] = search(model, windows, settings, removals)
        print(name, mode, {k: v for k, v in rows[mode].items() if k != "steps"}, flush=True)
    naive, exact = rows["naive"], rows["exact"]
    for row in rows.values():
        row["fewer_block_forwards"] = naive["block_forwards"] / row["block_forwards"]
        row["faster"] = naive["seconds"] / row["seconds"]
        row["same_removals_as_naive"] = [s["block"] for s in row["steps"]] == [s["block"] for s in naive["steps"]]
    layers = sum(b.parameters({}) for b in anatomy.blocks.values())
    return {
        "model": name,
        "depth": anatomy.depth,
        "windows": list(windows.shape),
        "removals": removals,
        "head_share_of_macs": anatomy.head / (layers + anatomy.head),
        "largest_score_difference_exact_naive": max(
            abs(a["loss"] - b["loss"]) for a, b in zip(exact["steps"], naive["steps"], strict=True)
        ),
        "modes": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--stories", help="folder of stories260K")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = pliant.text(arguments.text)
    results = []
    if arguments.stories:
        model = AutoModelForCausalLM.from_pretrained(arguments.stories)
        tokenizer = AutoTokenizer.from_pretrained(arguments.stories)
        windows = windows_for(model, tokenizer, text.sample(16, 0), 256, limit=8)
        results.append(compare("stories260K", model, windows, 4))
    shape = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=48, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape)
    results.append(compare("random 48 layers, width 256", model, torch.randint(2048, (1, 128)), 8))
    tokenizer = AutoTokenizer.from_pretrained(arguments.smollm2)
    model = AutoModelForCausalLM.from_pretrained(arguments.smollm2)
    windows = windows_for(model, tokenizer, text.sample(16, 0), 128, limit=2)
    results.append(compare("SmolLM2-135M", model, windows, 8))
    print(json.dumps([{k: v for k, v in r.items() if k != "modes"} for r in results], indent=1))
    save("search_cost", {"results": results})


if __name__ == "__main__":
    main()
