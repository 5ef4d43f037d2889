"""GGUF files of small models of every family, written and read back."""

from __future__ import annotations

import numpy as np

import pliant
from pico import pico
from pliant.exporters.gguf.containers import planned
from pliant.progress import Progress

BASE = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
GATED = (*BASE, "ffn_gate", "ffn_up", "ffn_down")
HEADS = ("attn_q_norm", "attn_k_norm")
POST = ("post_attention_norm", "post_ffw_norm")
EXPERTS = (*BASE, "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SIX = {"num_hidden_layers": 12, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2}
ROPE_FREE = {"num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2}
SEVERAL = {"num_key_value_heads": 6}
FAMILIES = {  # model_type -> what its config needs, the architecture of the file, and the tensors of a layer
    "llama": ({}, "llama", GATED),
    "mistral": ({}, "llama", GATED),
    "qwen2": ({}, "qwen2", GATED),
    "qwen3": ({}, "qwen3", (*GATED, *HEADS)),
    "gemma": ({}, "gemma", GATED),
    "gemma2": ({}, "gemma2", (*GATED, *POST)),
    "gemma3_text": (SIX, "gemma3", (*GATED, *POST, *HEADS)),
    "granite": ({}, "granite", GATED),
    "phi3": ({}, "phi3", ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")),
    "smollm3": (ROPE_FREE, "smollm3", GATED),
    "olmo2": ({}, "olmo2", (*HEADS, *POST, *(name for name in GATED if "norm" not in name))),
    "glm4": ({}, "glm4", (*BASE, *POST, "ffn_up", "ffn_down")),
    "stablelm": ({}, "stablelm", GATED),
    "starcoder2": ({}, "starcoder2", (*BASE, "ffn_up", "ffn_down")),
    "mixtral": ({}, "llama", EXPERTS),
    "qwen3_moe": ({}, "qwen3moe", (*EXPERTS, *HEADS)),
    "qwen2_moe": (
        {"mlp_only_layers": []},
        "qwen2moe",
        (*EXPERTS, "ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    ),
    "olmoe": (SEVERAL, "olmoe", (*EXPERTS, *HEADS)),
    "granitemoe": ({}, "granitemoe", EXPERTS),
}

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}


class File:
    """A file that is read back.

    Attributes:
        plan: what it was written from.
        tensors: name -> values, in the shape that PyTorch has.
    """

    def __init__(self, model, folder):
        from gguf import GGUFReader  # the extra gguf

        from pliant.exporters.gguf.writer import write

        path = folder / "model.gguf"
        self.plan = planned(model)
        write(path, self.plan, model, "f32", Progress())
        self.reader = GGUFReader(path)
        self.tensors = {one.name: np.array(one.data) for one in self.reader.tensors}
        self.architecture = self.reader.get_field("general.architecture").contents()

    def key(self, name):
        field = self.reader.get_field(f"{self.architecture}.{name}")
        return field and field.contents()

    def layer(self, number):
        prefix = f"blk.{number}."
        return {name.removeprefix(prefix).removesuffix(".weight") for name in self.tensors if name.startswith(prefix)}


def dense(name, **overrides):
    return pico(name, **FAMILIES[name][0] | overrides)


def cut(model, skip=(), **keep):
    """A model without blocks, and with fewer units of axes: ``m3_channels=8`` keeps 8 channels of ``layers.3.mlp``."""
    subnet = pliant.Subnet().without(*skip)
    for axis, units in keep.items():
        block, _, short = axis.partition("_")
        kind = {"a": "attention", "m": "mlp"}[block[0]]
        subnet = subnet.keeping(f"layers.{block[1:]}.{kind}.{short}", units)
    pliant.apply(model, pliant.Cut(subnet=subnet), progress=False)
    return model


def without(*layers):
    return [f"layers.{layer}.{kind}" for layer in layers for kind in ("attention", "mlp")]


def weight(model, name):
    parameter = model.get_parameter(name)
    return parameter.detach().numpy()


def halves(rows, heads):
    """Rows in pairs of neighbours, as heads of two halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
