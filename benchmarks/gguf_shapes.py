"""GGUF files of tiny random models, cut at random: logits of llama.cpp next to those of transformers.

    python benchmarks/gguf_shapes.py [--families llama qwen2 …] [--files 100] [--seed 0] [--tokens 60] [--limit 1e-3]

llama.cpp runs through the package llama-cpp-python, on a CPU, with float32 weights and a float32 cache, in a process
of its own for each file. Weights, norms and biases are random. Cuts are drawn until so many files are written, or five
times as many cuts are drawn; shapes that no container carries are counted by reason. A file counts as wrong if it does
not load, or if the norm of the difference of logits, divided by the norm of the logits, is above the limit.

llama.cpp's CPU kernels look GELU up in a table of float16 values, which alone makes a difference of up to 1e-3. So
models with GELU are compared twice: as they are, and with MLPs whose output is a 64th (``quiet``), which shows
everything else as exactly as with other models. The deepest ones, in which the rounding adds up, are only compared
that way.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

import pliant
from machine import save
from pliant.errors import ArtefactError
from pliant.exporters.gguf.containers import families, planned
from pliant.exporters.gguf.writer import write
from pliant.progress import Progress
from pliant.runtime.llama_process import LlamaProcess

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import pico  # tiny models of all families

DEEP = 40  # layers
DRAWS = 5  # cuts drawn for each file that is asked for
SIX = ["sliding_attention"] * 5 + ["full_attention"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LOCAL = {"full_attention": {**LINEAR, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
CONSTANTS = {"attention_multiplier": 0.2, "residual_multiplier": 0.3, "embedding_multiplier": 6.0}
CONSTANTS |= {"logits_scaling": 4.0}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
DELTA = {"linear_value_head_dim": 8}
DENSE = {"num_local_experts": 0}
VARIANTS: dict[str, list[dict[str, Any]]] = {  # keys of the config beside those of pico.py; one after another in turn
    "llama": [{"attention_bias": True}, {**TIED, "rope_parameters": LLAMA3}, {"rope_parameters": LONGROPE}],
    "mistral": [{"sliding_window": None}, {"sliding_window": 32}],
    "qwen2": [{}, {**TIED, "rope_parameters": YARN}],
    "qwen3": [TIED, {**TIED, "rope_parameters": LINEAR}, {}],
    "gemma2": [{"query_pre_attn_scalar": 11}, {"num_hidden_layers": 46}],
    "gemma3_text": [
        {"num_hidden_layers": 14, "layer_types": (SIX * 3)[:14], "query_pre_attn_scalar": 11},
        {"num_hidden_layers": 12, "layer_types": SIX * 2, **UNTIED, "final_logit_softcapping": 20.0},
        {"num_hidden_layers": 62, "layer_types": (SIX * 11)[:62], "rope_parameters": LOCAL},
    ],
    "granite": [CONSTANTS, {**CONSTANTS, **TIED, "attention_bias": True, "mlp_bias": True}],
    "phi3": [
        {"sliding_window": 32},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ],
    "smollm3": [{"num_hidden_layers": 9, "no_rope_layers": ([1, 1, 1, 0] * 3)[:9]}],
    "olmo2": [{}, TIED],
    "glm4": [{"attention_bias": True}, {**TIED, "partial_rotary_factor": 1.0}],
    "starcoder2": [{}, {**UNTIED, "sliding_window": 32}],
    "qwen2_moe": [{"mlp_only_layers": []}],
    "olmoe": [{"num_key_value_heads": 6, "norm_topk_prob": False}],
    "granitemoe": [CONSTANTS, TIED],
    "granitemoehybrid": [DENSE, {**DENSE, "position_embedding_type": None, "num_hidden_layers": 8}, {}],
    "mamba": [{"intermediate_size": 64}, {"use_conv_bias": False, **UNTIED}],
    "mamba2": [{}, {"num_hidden_layers": 7, "use_conv_bias": False}],
    "nemotron_h": [{"time_step_min": 1e-30}, {"use_conv_bias": False, "attention_bias": True, "mlp_bias": True}],
    "falcon_h1": [{}, {"mamba_rms_norm": False, **TIED}],
    "lfm2": [{}, {"num_hidden_layers": 9, "conv_L_cache": 4}],
    "lfm2_moe": [{}, {"num_hidden_layers": 8, "num_dense_layers": 3, "routed_scaling_factor": 1.7}],
    "qwen3_next": [{"mlp_only_layers": [], **DELTA}, {"mlp_only_layers": [], **DELTA, **TIED, "num_hidden_layers": 7}],
    "qwen3_5_text": [DELTA, {**DELTA, "num_hidden_layers": 7, "head_dim": 32}],
    "qwen3_5_moe_text": [DELTA],
    "jamba": [{}, {"num_hidden_layers": 8, "num_experts": 1}],
}
PERIODS = {"gemma2": 2, "gemma3_text": 6, "smollm3": 4}  # layers that are only removed together
ROUNDING = ("mamba", "falcon_mamba")  # four layers of larger weights amplify the rounding of float32 a thousand times
GELU = ("gemma", "gemma2", "gemma3_text", "starcoder2")


def model_of(family: str, number: int, quiet: bool) -> Any:
    """A model with random weights, norms and biases."""
    variants = VARIANTS.get(family, [{}])
    if family in GELU and not quiet:
        variants = [one for one in variants if one.get("num_hidden_layers", 0) < DEEP]
    torch.manual_seed(number)
    config = pico.config(family, **variants[number % len(variants)])
    model = pico.head_of(family).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if values.dim() == 1 and ("bias" in name or isinstance(values, torch.nn.Parameter)):
                values.add_(torch.randn_like(values) * 0.2)
            elif isinstance(values, torch.nn.Parameter):
                values.mul_(2 if family in ROUNDING else 4)
            if quiet and "post_feedforward_layernorm" in name:
                values.copy_((values + 1) / 64 - 1)
            elif quiet and re.search(r"mlp\.(down|c)_proj", name) and family in ("gemma", "starcoder2"):
                values.div_(64)
    return model


def subnet_of(family: str, anatomy: Any, draw: random.Random) -> pliant.Subnet:
    """A random cut: of whole layers and equal widths, of any blocks and equal widths, or of all that can be cut."""
    period = PERIODS.get(family, 1)
    kind = draw.choice(("layers", "layers", "blocks", "all", "outside scans"))
    subnet, widths = pliant.Subnet(), {}
    if kind == "layers":
        for start in range(0, anatomy.depth, period):
            if draw.random() < 0.3:
                shorter = subnet
                for block in anatomy.blocks.values():
                    if start <= block.layer < start + period:
                        may = {one.name for one in anatomy.may_go(shorter.skip)}
                        shorter = shorter.without(block.name) if block.name in may else shorter
                subnet = shorter if len(shorter.skip) % period == 0 else subnet
    for block in anatomy.blocks.values():
        if block.name in subnet.skip:
            continue
        if kind != "layers" and draw.random() < 0.25 and block in anatomy.may_go(subnet.skip):
            subnet = subnet.without(block.name)
            continue
        for axis in block.leaders:
            short = axis.name.rpartition(".")[2]
            units = draw.choice([units for units in range(1, axis.size + 1) if axis.allows(units)])
            if kind in ("layers", "blocks"):
                units = widths.setdefault(short, units if draw.random() < 0.5 else axis.size)
            elif kind == "outside scans" and block.role in ("scan", "conv"):
                units = axis.size
            if axis.allows(units):
                subnet = subnet.keeping(axis.name, units)
    return subnet


def files_of(family: str, arguments: argparse.Namespace, quiet: bool) -> Iterator[tuple[Any, Any, Any]]:
    """Cut models with their Subnet, and the plan of a file or the reason why there is none."""
    written = 0
    for number in range(DRAWS * arguments.files):
        model = model_of(family, number, quiet)
        draw = random.Random(f"{arguments.seed} {family} {number}")
        subnet = subnet_of(family, pliant.anatomy_of(model), draw) if number else pliant.Subnet()
        pliant.apply(model, pliant.Cut(subnet=subnet), progress=False)
        try:
            plan = planned(model)
        except ArtefactError as refusal:
            yield model, subnet, str(refusal)
            continue
        plan.metadata |= {"tokenizer.ggml.model": "none", ".vocab_size": pico.VOCABULARY}
        yield model, subnet, plan
        written += 1
        if written == arguments.files:
            return


def compare(family: str, arguments: argparse.Namespace, path: Path, quiet: bool) -> dict[str, Any]:
    """The largest difference in the files of a family, what was refused, and what is wrong."""
    architectures: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    differences, wrong = [], []
    for model, subnet, plan in files_of(family, arguments, quiet):
        if isinstance(plan, str):
            refused[re.sub(r"\[[\d, ]+\]|(?<!\w)\d+", "N", plan.partition(": ")[2] or plan)] += 1
            continue
        write(path, plan, model, "f32", Progress())
        tokens = min(arguments.tokens, plan.metadata[".context_length"])
        ids = torch.randint(3, pico.VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(arguments.seed))
        with torch.inference_mode():
            expected = model(ids, use_cache=False).logits[0].numpy()
        architectures[plan.architecture] += 1
        try:
            with LlamaProcess(path, context=len(ids[0]), cache="f32", threads=1) as opened:
                found = opened.logits(ids[0].tolist())
        except ArtefactError as error:
            wrong.append({"subnet": str(subnet), "error": str(error)})
            continue
        difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        differences.append(difference)
        if not difference <= arguments.limit:
            wrong.append({"subnet": str(subnet), "difference": difference})
    return {
        "architectures": dict(architectures),
        "largest_difference": max(differences, default=None),
        "median_difference": float(np.median(differences)) if differences else None,
        "refused": dict(refused.most_common()),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="*", help="model types; default: all that a container carries")
    parser.add_argument("--files", type=int, default=100, help="files of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=60, help="length of the text, more than all sliding windows")
    parser.add_argument("--limit", type=float, default=1e-3, help="largest relative difference that counts as equal")
    parser.add_argument("--name", default="gguf_shapes", help="of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families or families():
            for quiet in (False, True) if family in GELU else (False,):
                name = f"{family} (quiet)" if quiet else family
                results[name] = result = compare(family, arguments, Path(folder) / "model.gguf", quiet)
                print(
                    f"{name}: {result['architectures']}, largest difference {result['largest_difference']}, "
                    f"{sum(result['refused'].values())} refused, {len(result['wrong'])} wrong",
                    flush=True,
                )
    save(arguments.name, {"llama-cpp-python": llama_cpp.__version__, "settings": vars(arguments), "families": results})


if __name__ == "__main__":
    main()
