"""Is a pruned model as much faster as its removed MACs and bytes predict?

    python benchmarks/speedup.py [--smollm2 DIR]

Both models of a pair are timed in turn in one process. Prefill is predicted from multiply-accumulates, decode from the
bytes a step reads: weights and cache. The random model of about 1 B parameters is large enough that matrix products are
what takes the time; on SmolLM2-135M PyTorch's own overhead between them takes a large part of a decoding step, and
removing blocks removes it too.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pliant
from machine import save
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, extract, macs, ratio, streamed_bytes

CHANNELS = 32  # MLP channels come and go in groups, as the pruners take them


def every(anatomy, kind: str, step: int) -> Subnet:
    """Remove the block of every step-th layer."""
    subnet = Subnet()
    for layer in range(1, anatomy.depth, step):
        subnet = subnet.without(f"layers.{layer}.{kind}")
    return subnet


def narrow(anatomy, kind: str, share: float, group: int) -> Subnet:
    """Keep a share of every axis of a kind of block, in whole groups, as the pruners do."""
    subnet = Subnet()
    for block in anatomy.blocks.values():
        if block.kind == kind:
            for axis in block.leaders:
                subnet = subnet.keeping(axis.name, round(axis.size * share / group) * group)
    return subnet


def cases(anatomy) -> dict[str, Subnet]:
    layers = Subnet()
    for layer in range(1, anatomy.depth, 4):
        layers = layers.without(f"layers.{layer}.attention").without(f"layers.{layer}.mlp")
    return {
        "every 4th layer": layers,
        "every 3rd attention": every(anatomy, "attention", 3),
        "every 4th MLP": every(anatomy, "mlp", 4),
        "MLP channels to 60 %": narrow(anatomy, "mlp", 0.6, CHANNELS),
        "a third of the key-value groups": narrow(anatomy, "attention", 2 / 3, 1),
    }


def measure(name: str, model, prompt: int, tokens: int, repeats: int) -> list[dict]:
    rows = []
    anatomy = anatomy_of(model)
    element = next(model.parameters()).element_size()
    for case, subnet in cases(anatomy).items():
        cut = copy.deepcopy(model)
        extract(cut, anatomy, subnet)
        speed = pliant.bench(cut, model, prompt=prompt, tokens=tokens, repeats=repeats)
        reads = [streamed_bytes(anatomy, one, element=element, context=prompt) for one in (Subnet(), subnet)]
        predicted = {
            "prefill": macs(anatomy, tokens=prompt) / macs(anatomy, subnet, tokens=prompt),
            "decode": reads[0] / reads[1],
        }
        row = {"model": name, "case": case, "ratio": ratio(anatomy, subnet), "predicted": predicted, "speed": speed}
        row["measured_over_predicted"] = {k: speed["speedup"][k]["median"] / predicted[k] for k in predicted}
        rows.append(row)
        shown = {k: f"{predicted[k]:.3f} -> {speed['speedup'][k]['median']:.3f}" for k in predicted}
        print(name, case, f"{row['ratio']:.3f}", shown, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    count = sum(p.numel() for p in model.parameters())
    rows += measure(f"random Llama, {count / 1e9:.2f} B", model, prompt=64, tokens=6, repeats=arguments.repeats)
    del model
    if arguments.smollm2:
        model = AutoModelForCausalLM.from_pretrained(arguments.smollm2).eval()
        rows += measure("SmolLM2-135M", model, prompt=256, tokens=24, repeats=arguments.repeats)
    save("speedup", {"rows": rows})


if __name__ == "__main__":
    main()
