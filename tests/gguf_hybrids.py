"""Small state-space models and hybrids whose GGUF files are written and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pliant
from pico import SCANS, pico

NEWEST = pytest.mark.skipif(not SCANS, reason="the scans of this transformers have norms over all groups")
EQUAL = {"linear_value_head_dim": 8}  # of a delta rule: values as wide as keys
NEEDS = {"qwen3_5_text": EQUAL, "qwen3_5_moe_text": EQUAL, "qwen3_next": EQUAL | {"mlp_only_layers": []}}
SCAN = {"ssm_in", "ssm_conv1d", "ssm_conv1d.bias", "ssm_dt.bias", "ssm_a", "ssm_d", "ssm_norm", "ssm_out"}
SELECTIVE = SCAN - {"ssm_norm"} | {"ssm_x", "ssm_dt"}
ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_output"}
HEADS = {"attn_q_norm", "attn_k_norm"}
MLP = {"ffn_gate", "ffn_up", "ffn_down"}
EXPERTS = {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
SHARED = {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
CONV = {"shortconv.conv", "shortconv.in_proj", "shortconv.out_proj"}
RULE = {"attn_qkv", "attn_gate", "ssm_conv1d", "ssm_dt.bias", "ssm_a", "ssm_norm", "ssm_out"}
NORMS, POST = {"attn_norm", "ffn_norm"}, {"attn_norm", "post_attention_norm"}
FAMILIES = {  # model_type -> architecture of the file, and the tensors of its first two layers
    "nemotron_h": ("nemotron_h", SCAN | {"attn_norm"}, {"attn_norm", "ffn_up", "ffn_down"}),
    "granitemoehybrid": ("granitehybrid", SCAN | NORMS | EXPERTS | SHARED, ATTENTION | NORMS | EXPERTS | SHARED),
    "bamba": ("granitehybrid", SCAN | NORMS | MLP, ATTENTION | NORMS | MLP),
    "falcon_h1": ("falcon-h1", *[SCAN | ATTENTION | NORMS | MLP] * 2),
    "mamba": ("mamba", *[SELECTIVE | {"attn_norm"}] * 2),
    "falcon_mamba": ("mamba", *[SELECTIVE | {"attn_norm"}] * 2),
    "mamba2": ("mamba2", *[SCAN | {"attn_norm"}] * 2),
    "jamba": (
        "jamba",
        SELECTIVE | NORMS | MLP | {"ssm_dt_norm", "ssm_b_norm", "ssm_c_norm"},
        ATTENTION | NORMS | EXPERTS,
    ),
    "lfm2": ("lfm2", CONV | NORMS | MLP, ATTENTION | HEADS | NORMS | MLP),
    "lfm2_moe": ("lfm2moe", CONV | NORMS | MLP, ATTENTION | HEADS | NORMS | EXPERTS | {"exp_probs_b.bias"}),
    "qwen3_next": (
        "qwen3next",
        RULE | POST | EXPERTS | SHARED | {"ssm_ba", "ffn_gate_inp_shexp"},
        ATTENTION | HEADS | POST | EXPERTS | SHARED | {"ffn_gate_inp_shexp"},
    ),
    "qwen3_5_text": ("qwen35", RULE | POST | MLP | {"ssm_alpha", "ssm_beta"}, ATTENTION | HEADS | POST | MLP),
    "qwen3_5_moe_text": (
        "qwen35moe",
        RULE | POST | EXPERTS | SHARED | {"ssm_alpha", "ssm_beta", "ffn_gate_inp_shexp"},
        ATTENTION | HEADS | POST | EXPERTS | SHARED | {"ffn_gate_inp_shexp"},
    ),
}


def built(family, **overrides):
    return pico(family, **NEEDS.get(family, {}) | overrides)


def cut(model, *skip, **keep):
    """A model without blocks; ``mamba_scan=4`` keeps 4 heads of the scan in every layer that has a block of mamba."""
    subnet = pliant.Subnet().without(*skip)
    for name in pliant.anatomy_of(model).axes:
        _, layer, kind, axis = name.split(".")
        units = keep.get(f"{kind}_{axis}", keep.get(f"{kind}_{axis}_{layer}"))
        if units is not None and f"layers.{layer}.{kind}" not in skip:
            subnet = subnet.keeping(name, units)
    pliant.apply(model, pliant.Cut(subnet=subnet), progress=False)
    return model


def same(stored, own):
    own = own.detach().numpy() if isinstance(own, torch.Tensor) else own
    assert stored.shape == own.shape
    return np.allclose(stored, own, rtol=1e-6, atol=0)
