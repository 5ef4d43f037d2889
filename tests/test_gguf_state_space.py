"""The files of state-space models and hybrids, read back: names, shapes, values and what each layer is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pliant
from gguf_files import File, halves, weight
from pico import SCANS, pico
from pliant.errors import ArtefactError
from pliant.exporters.gguf.containers import planned

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not SCANS, reason="the scans of this transformers have norms over all groups")

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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_written_in_its_own_architecture(family, tmp_path):
    model = built(family)
    file = File(model, tmp_path)
    architecture, *layers = FAMILIES[family]
    assert file.architecture == architecture
    for number, names in enumerate(layers):
        assert file.layer(number) == names
    assert file.key("block_count") == model.config.num_hidden_layers
    assert file.key("embedding_length") == model.config.hidden_size
    epsilon = next(
        getattr(model.config, key)
        for key in ("rms_norm_eps", "layer_norm_epsilon", "norm_eps")
        if hasattr(model.config, key)
    )
    assert file.key("attention.layer_norm_rms_epsilon") == pytest.approx(epsilon)
    assert [note for note in file.plan.notes if "time steps" not in note] == []
    norms = [name for name in file.tensors if "norm" in name and name.startswith("blk.")]
    assert len({file.tensors[name].tobytes() for name in norms}) == len(norms)  # none is written twice
    assert all(one.tensor_type.name == "F32" for one in file.reader.tensors)


# Mamba-2


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("nemotron_h", "model.layers.{}.mixer"),
        ("mamba2", "backbone.layers.{}.mixer"),
        ("granitemoehybrid", "model.layers.{}.mamba"),
        ("bamba", "model.layers.{}.mamba"),
    ],
)
def test_the_tensors_of_a_scan(family, path, tmp_path):
    model = built(family)
    file, mixer = File(model, tmp_path), model.get_submodule(path.format(0))
    tensors = {name.removeprefix("blk.0."): values for name, values in file.tensors.items()}
    channels, groups = mixer.intermediate_size, mixer.n_groups
    assert same(tensors["ssm_in.weight"], mixer.in_proj.weight)
    assert same(tensors["ssm_out.weight"], mixer.out_proj.weight)
    assert same(tensors["ssm_conv1d.weight"], mixer.conv1d.weight[:, 0])
    assert same(tensors["ssm_conv1d.bias"], mixer.conv1d.bias)
    assert same(tensors["ssm_dt.bias"], mixer.dt_bias)
    assert same(tensors["ssm_a"], -np.exp(mixer.A_log.detach().numpy())[:, None])
    assert same(tensors["ssm_d"], mixer.D[:, None])
    assert same(tensors["ssm_norm.weight"], mixer.norm.weight.view(groups, channels // groups))
    assert file.key("ssm.inner_size") == channels
    assert file.key("ssm.time_step_rank") == mixer.num_heads
    assert file.key("ssm.group_count") == groups == 2
    assert file.key("ssm.state_size") == 10
    assert file.key("ssm.conv_kernel") == 4


def test_readers_always_add_a_bias_to_a_convolution(tmp_path):
    tensors = File(built("mamba2", use_conv_bias=False), tmp_path).tensors
    assert tensors["blk.1.ssm_conv1d.bias"].shape == (64 + 2 * 2 * 10,)
    assert not tensors["blk.1.ssm_conv1d.bias"].any()


def test_the_epsilon_of_a_cut_scan_is_that_of_the_file(tmp_path):
    """All other norms compute the same, because the residual stream grows by the root of the ratio."""
    model = cut(built("nemotron_h"), mamba_scan=4)
    file, layers = File(model, tmp_path), model.model.layers
    assert layers[0].mixer.norm.variance_epsilon == pytest.approx(2e-5)
    assert file.key("attention.layer_norm_rms_epsilon") == pytest.approx(2e-5)
    assert file.key("attention.layer_norm_epsilon") == pytest.approx(2e-5)
    larger = math.sqrt(2)
    assert same(file.tensors["token_embd.weight"], larger * model.model.embeddings.weight)
    assert same(file.tensors["blk.0.ssm_out.weight"], larger * layers[0].mixer.out_proj.weight)
    assert same(file.tensors["blk.1.ffn_down.weight"], larger * layers[1].mixer.down_proj.weight)
    assert same(file.tensors["blk.2.attn_output.weight"], larger * layers[2].mixer.o_proj.weight)
    assert same(file.tensors["blk.0.ssm_in.weight"], layers[0].mixer.in_proj.weight)
    assert same(file.tensors["blk.0.attn_norm.weight"], layers[0].norm.weight)
    assert same(file.tensors["output_norm.weight"], model.model.norm_f.weight)
    assert same(file.tensors["output.weight"], model.lm_head.weight)


def test_a_larger_embedding_that_is_the_output_head_is_undone_by_the_last_norm(tmp_path):
    model = cut(built("mamba2", tie_word_embeddings=True), mamba_scan=2)
    file = File(model, tmp_path)
    assert "output.weight" not in file.tensors
    assert same(file.tensors["token_embd.weight"], 2 * model.backbone.embeddings.weight)
    assert same(file.tensors["output_norm.weight"], model.backbone.norm_f.weight / 2)


@pytest.mark.parametrize(
    ("family", "keep", "reason"),
    [
        ("nemotron_h", {"mamba_scan_0": 4}, r"the norms of its scans have different epsilons"),
        ("nemotron_h", {"mamba_state_0": 4}, r"its scans differ from layer to layer \(state_size: \[4, 10\]\)"),
        ("mamba2", {"mamba_group_1": 1}, r"its scans differ from layer to layer \(inner_size: \[32, 64\]\)"),
        ("mamba2", {"mamba_state": 0}, "layers.0.mamba is a convolution whose scan was removed"),
        ("mamba", {"mamba_channels_1": 8}, r"its scans differ from layer to layer \(inner_size: \[8, 64\]\)"),
        ("mamba", {"mamba_channels": 8}, "its scans have 8 channels, and readers take 64 alone"),
        ("bamba", {"mamba_scan": 4}, "its scans have 32 channels, and those of granitehybrid have 96"),
        ("bamba", {"mlp_channels_1": 8}, "its MLP widths differ from layer to layer, and granitehybrid has one"),
        ("granitemoehybrid", {"moe_experts_1": 2}, "the numbers or widths of its experts differ"),
        ("falcon_h1", {"attention_kv_1": 2}, r"its attention sizes \(q\): \[4, 6\] differ from layer to layer"),
        ("lfm2", {"attention_kv_1": 2}, "layers.1.attention has 4 heads, and lfm2 has 6"),
        ("lfm2", {"conv_conv_0": 8}, "layers.0.conv has 8 channels, and lfm2 has 48"),
        ("lfm2_moe", {"mlp_experts_1": 2}, "its numbers of experts differ from layer to layer"),
        ("qwen3_next", {"delta_key_0": 1}, "the heads of its delta rules differ from layer to layer"),
        ("qwen3_next", {"attention_kv_1": 1}, "its numbers of heads differ from layer to layer"),
    ],
)
def test_sizes_that_readers_have_once_are_refused_where_they_differ(family, keep, reason):
    with pytest.raises(ArtefactError, match=reason):
        planned(cut(built(family), **keep))


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "the activation silu, and nemotron_h computes relu2"),
        (
            "nemotron_h",
            {"mamba_hidden_act": "gelu"},
            "layers.0.mamba has the activation gelu, and readers compute silu",
        ),
        ("mamba2", {"use_bias": True}, "the projections of layers.0.mamba have a bias"),
        ("mamba2", {"time_step_limit": (0.0, 1.0)}, "the time steps of layers.0.mamba end at 1"),
        ("bamba", {"attn_layer_indices": [0, 1, 2, 3]}, "no scan is left"),
        ("bamba", {"attn_layer_indices": None}, "no attention is left"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "no attention is left"),
        ("lfm2", {"layer_types": ["full_attention"] * 4}, "no convolution is left"),
        ("nemotron_h", {"hybrid_override_pattern": "M-M-", "num_hidden_layers": 4}, "no attention is left"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 4}, "no delta rule is left"),
        ("falcon_h1", {"mamba_norm_before_gate": True}, "layers.0.mamba is normed before its gate"),
        ("falcon_h1", {"attention_bias": True}, "self_attn.q_proj has a bias, and falcon-h1 has none there"),
        ("lfm2", {"conv_bias": True}, "layers.0.conv has biases, and lfm2 has none there"),
        ("lfm2_moe", {"norm_topk_prob": False}, "the weights of its experts do not add up to 1"),
        ("qwen3_next", {"linear_value_head_dim": 10}, "keys of 8 and values of 10 dimensions"),
        ("qwen3_next", {"mlp_only_layers": [1]}, "layers.1.mlp has no experts, as every layer of qwen3next has"),
        ("qwen3_next", {"rms_norm_eps": 1e-5}, "its norms have the epsilon 1e-05, and those of keys and queries"),
    ],
)
def test_models_that_readers_would_compute_otherwise_are_refused(family, overrides, reason):
    with pytest.raises(ArtefactError, match=reason):
        planned(built(family, **overrides))


def test_short_time_steps_are_noted():
    (note,) = planned(built("nemotron_h")).notes
    assert note == "time steps below 0.001 are raised to that by transformers, and not by readers of the file"


# Layers that are one block


def test_any_block_of_nemotron_h_may_go(tmp_path):
    """M-*M*- without its first MLP and first attention."""
    model = cut(built("nemotron_h"), "layers.1.mlp", "layers.2.attention", attention_kv=2, mlp_channels=8)
    file = File(model, tmp_path)
    assert file.key("block_count") == 4
    assert file.key("feed_forward_length") == [0, 0, 0, 8]
    assert file.key("attention.head_count_kv") == [0, 0, 2, 0]
    assert file.key("attention.head_count") == [4, 4, 4, 4]  # the first one makes sizes that all layers need
    assert same(file.tensors["blk.1.ssm_in.weight"], model.model.layers[3].mixer.in_proj.weight)
    assert same(file.tensors["blk.2.attn_k.weight"], model.model.layers[4].mixer.k_proj.weight)
    assert same(file.tensors["blk.3.ffn_up.weight"], model.model.layers[5].mixer.up_proj.weight)
    assert same(file.tensors["blk.3.attn_norm.weight"], model.model.layers[5].norm.weight)


def test_widths_of_nemotron_h_differ_from_layer_to_layer(tmp_path):
    model = cut(
        built("nemotron_h", hybrid_override_pattern="M-*-*-"), mlp_channels_1=8, mlp_channels_5=16, attention_kv_2=1
    )
    file = File(model, tmp_path)
    assert file.key("feed_forward_length") == [0, 8, 0, 48, 0, 16]
    assert file.key("attention.head_count") == [2, 2, 2, 2, 6, 2]
    assert file.key("attention.head_count_kv") == [0, 0, 1, 0, 3, 0]


def test_removed_layers_of_mamba_leave_nothing(tmp_path):
    model = cut(built("mamba2"), "layers.0.mamba", "layers.2.mamba")
    file = File(model, tmp_path)
    assert file.key("block_count") == 2
    assert file.key("attention.head_count") == file.key("feed_forward_length") == 0
    assert same(file.tensors["blk.1.ssm_in.weight"], model.backbone.layers[3].mixer.in_proj.weight)


# Granite 4 and Bamba


def test_multipliers_of_granite_have_keys(tmp_path):
    file = File(built("granitemoehybrid", attention_multiplier=0.25), tmp_path)
    assert file.key("embedding_scale") == 2.0
    assert file.key("residual_scale") == 0.5
    assert file.key("logit_scale") == 2.0
    assert file.key("attention.scale") == 0.25
    assert file.key("rope.scaling.finetuned") is True
    assert not File(built("granitemoehybrid", position_embedding_type=None), tmp_path).key("rope.scaling.finetuned")


def test_experts_of_granite_are_split_and_the_mlp_is_a_shared_one(tmp_path):
    model = built("granitemoehybrid")
    file, layer = File(model, tmp_path), model.model.layers[1]
    routed, shared = layer.block_sparse_moe, layer.shared_mlp
    assert same(file.tensors["blk.1.ffn_gate_exps.weight"], routed.experts.gate_up_proj[:, :48])
    assert same(file.tensors["blk.1.ffn_up_exps.weight"], routed.experts.gate_up_proj[:, 48:])
    assert same(file.tensors["blk.1.ffn_down_exps.weight"], routed.experts.down_proj)
    assert same(file.tensors["blk.1.ffn_gate_inp.weight"], routed.router.weight)
    assert same(file.tensors["blk.1.ffn_gate_shexp.weight"], shared.input_linear.weight[:40])
    assert same(file.tensors["blk.1.ffn_up_shexp.weight"], shared.input_linear.weight[40:])
    assert same(file.tensors["blk.1.ffn_down_shexp.weight"], shared.output_linear.weight)
    assert [file.key(name) for name in ("expert_count", "expert_used_count")] == [4, 2]
    assert file.key("feed_forward_length") == 48
    assert file.key("expert_shared_feed_forward_length") == 40


def test_removed_experts_of_granite_are_zeros(tmp_path):
    model = cut(built("granitemoehybrid"), "layers.1.moe", "layers.2.mlp", "layers.3.moe", "layers.3.mlp")
    file = File(model, tmp_path)
    assert file.layer(1) == file.layer(3) == ATTENTION | NORMS | EXPERTS | SHARED
    zeros = {name for name, values in file.tensors.items() if name.startswith("blk") and not values.any()}
    parts = [("gate_inp", "gate_exps", "up_exps", "down_exps"), ("gate_shexp", "up_shexp", "down_shexp")]
    lost = {1: parts[0], 2: parts[1], 3: (*parts[0], *parts[1])}
    expected = {f"blk.{layer}.ffn_{name}.weight" for layer, names in lost.items() for name in names}
    assert zeros == expected | {"blk.3.ffn_norm.weight"}
    assert file.plan.notes == [
        "layer 3 of the file has an MLP of 48 channels that adds nothing",
        "layer 1 of the file has a block (experts) that adds nothing",
        "layer 2 of the file has a block (mlp) that adds nothing",
    ]


def test_a_dense_granite_has_no_experts(tmp_path):
    model = built("granitemoehybrid", num_local_experts=0)
    file = File(model, tmp_path)
    assert file.layer(1) == ATTENTION | NORMS | MLP
    assert file.key("expert_count") is None
    assert file.key("feed_forward_length") == 40
    assert same(file.tensors["blk.1.ffn_gate.weight"], model.model.layers[1].shared_mlp.input_linear.weight[:40])


def test_blocks_of_different_layers_become_one(tmp_path):
    """Two MLPs in a row need an attention between them, two mixers an MLP; others are put together."""
    model = cut(built("bamba"), "layers.0.mlp", "layers.1.attention", "layers.2.mlp", attention_kv=2)
    file = File(model, tmp_path)
    assert file.key("block_count") == 3
    assert file.key("attention.head_count_kv") == [0, 0, 2]
    assert same(file.tensors["blk.0.ffn_up.weight"], model.model.layers[1].feed_forward.up_proj.weight)
    assert same(file.tensors["blk.1.ssm_in.weight"], model.model.layers[2].mamba.in_proj.weight)
    assert not file.tensors["blk.1.ffn_down.weight"].any()
    assert file.plan.notes == ["layer 1 of the file has an MLP of 48 channels that adds nothing"]


def test_an_attention_that_adds_nothing_is_between_two_mlps(tmp_path):
    model = cut(built("bamba"), "layers.1.attention")
    file = File(model, tmp_path)
    assert file.key("attention.head_count") == [1, 1, 1, 6]
    assert file.key("attention.head_count_kv") == [0, 1, 0, 3]
    assert file.tensors["blk.1.attn_output.weight"].shape == (48, 8)
    assert not file.tensors["blk.1.attn_output.weight"].any()


def test_the_part_of_a_head_that_rotates_is_turned_to_pairs(tmp_path):
    """Of Bamba, half."""
    model = built("bamba")
    file = File(model, tmp_path)
    assert file.key("rope.dimension_count") == 4
    own = weight(model, "model.layers.1.self_attn.q_proj.weight").reshape(6, 8, 48)
    stored = file.tensors["blk.1.attn_q.weight"].reshape(6, 8, 48)
    assert (stored[:, 4:] == own[:, 4:]).all()
    assert (halves(stored[:, :4].reshape(24, 48), 6) == own[:, :4].reshape(24, 48)).all()


# Falcon H1


def test_multipliers_of_falcon_h1_are_in_its_weights(tmp_path):
    model = built("falcon_h1")
    file, layer = File(model, tmp_path), model.model.layers[1]
    tensors = {name.removeprefix("blk.1.").removesuffix(".weight"): values for name, values in file.tensors.items()}
    mixer, attention, mlp = layer.mamba, layer.self_attn, layer.feed_forward
    assert same(tensors["ssm_in"], 1.5 * mixer.mup_vector[0, 0][:, None] * mixer.in_proj.weight)
    assert same(tensors["ssm_out"], 0.5 * mixer.out_proj.weight)
    assert same(tensors["attn_q"], 0.75 * attention.q_proj.weight)
    assert same(tensors["attn_k"], 0.75 * 0.5 * attention.k_proj.weight)
    assert same(tensors["attn_v"], 0.75 * attention.v_proj.weight)
    assert same(tensors["attn_output"], 1.25 * attention.o_proj.weight)
    assert same(tensors["ffn_gate"], 1.5 * mlp.gate_proj.weight)
    assert same(tensors["ffn_up"], mlp.up_proj.weight)
    assert same(tensors["ffn_down"], 0.5 * mlp.down_proj.weight)
    assert same(tensors["token_embd"], 2 * model.model.embed_tokens.weight)
    assert same(tensors["output"], 0.5 * model.lm_head.weight)
    assert "blk.1.ffn_norm" in file.tensors  # readers ask for it by this name


def test_a_tied_head_of_falcon_h1_is_undone_by_the_last_norm(tmp_path):
    model = built("falcon_h1", tie_word_embeddings=True)
    file = File(model, tmp_path)
    assert "output.weight" not in file.tensors
    assert same(file.tensors["output_norm.weight"], 0.5 / 2 * model.model.final_layernorm.weight)


def test_removed_blocks_of_falcon_h1_are_zeros_and_removed_layers_are_not_written(tmp_path):
    removed = ("layers.0.mamba", "layers.0.attention", "layers.0.mlp", "layers.1.mamba", "layers.2.attention")
    model = cut(built("falcon_h1"), *removed)
    file = File(model, tmp_path)
    assert file.key("block_count") == 3
    assert file.layer(0) == file.layer(2) == FAMILIES["falcon_h1"][1]
    assert not any(file.tensors[f"blk.0.{name}"].any() for name in ("ssm_in.weight", "ssm_out.weight", "ssm_a"))
    assert not file.tensors["blk.1.attn_output.weight"].any()
    assert same(file.tensors["blk.1.attn_norm.weight"], model.model.layers[2].input_layernorm.weight)
    assert file.plan.notes == [
        "layer 0 of the file has a block (scan) of full size that adds nothing",
        "layer 1 of the file has a block (attention) of full size that adds nothing",
    ]


# Mamba


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_the_tensors_of_mamba(family, tmp_path):
    model = built(family)
    file, mixer = File(model, tmp_path), model.backbone.layers[2].mixer
    tensors = {name.removeprefix("blk.2."): values for name, values in file.tensors.items()}
    assert same(tensors["ssm_in.weight"], mixer.in_proj.weight)
    assert same(tensors["ssm_conv1d.weight"], mixer.conv1d.weight[:, 0])
    assert same(tensors["ssm_dt.weight"], mixer.dt_proj.weight)
    assert same(tensors["ssm_dt.bias"], mixer.dt_proj.bias)
    assert same(tensors["ssm_a"], -mixer.A_log.exp())
    assert same(tensors["ssm_d"], mixer.D)
    assert same(tensors["ssm_out.weight"], mixer.out_proj.weight)
    normed = family == "falcon_mamba"
    assert file.key("ssm.dt_b_c_rms") is normed
    larger = math.sqrt(model.config.layer_norm_epsilon / mixer.b_layernorm.eps) if normed else 1
    assert not normed or larger == pytest.approx(math.sqrt(10))
    assert same(tensors["ssm_x.weight"], larger * mixer.x_proj.weight)  # readers have one epsilon
    assert [file.key(f"ssm.{name}") for name in ("inner_size", "state_size", "time_step_rank")] == [64, 6, 4]


def test_cut_norms_of_jamba_have_the_epsilon_of_the_file(tmp_path):
    """The values that they norm are smaller instead."""
    model = cut(built("jamba"), mamba_state=3, mamba_rank=4)
    file, mixer = File(model, tmp_path), model.model.layers[0].mamba
    assert file.key("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert mixer.b_layernorm.variance_epsilon == pytest.approx(2e-6)
    stored, own = file.tensors["blk.0.ssm_x.weight"], weight(model, "model.layers.0.mamba.x_proj.weight")
    assert same(stored[:4], own[:4] * np.float32(math.sqrt(4 / 5)))
    assert same(stored[4:], own[4:] * np.float32(math.sqrt(1 / 2)))
    assert same(file.tensors["blk.0.ssm_b_norm.weight"], mixer.b_layernorm.weight)
    assert file.key("attention.head_count_kv") == [0, 3, 0, 3]
    assert [file.key(name) for name in ("expert_count", "expert_used_count")] == [4, 2]


def test_experts_of_jamba_are_as_many_in_all_layers_that_have_some():
    model = cut(built("jamba", num_hidden_layers=8), mlp_experts_4=2)
    with pytest.raises(ArtefactError, match=r"its numbers of experts differ from layer to layer: \[2, 4\]"):
        planned(model)


# LFM2


def test_convolutions_of_lfm2(tmp_path):
    model = cut(built("lfm2"), "layers.2.conv", "layers.2.mlp")
    file, conv = File(model, tmp_path), model.model.layers[0].conv
    assert same(file.tensors["blk.0.shortconv.conv.weight"], conv.conv.weight[:, 0])
    assert same(file.tensors["blk.0.shortconv.in_proj.weight"], conv.in_proj.weight)
    assert same(file.tensors["blk.0.shortconv.out_proj.weight"], conv.out_proj.weight)
    assert same(file.tensors["token_embd_norm.weight"], model.model.embedding_norm.weight)
    assert "output_norm.weight" not in file.tensors
    assert file.key("attention.head_count_kv") == [0, 3, 3]
    assert file.key("shortconv.l_cache") == 3
    assert same(file.tensors["blk.2.attn_q.weight"], model.model.layers[3].self_attn.q_proj.weight)


def test_experts_of_lfm2_come_after_its_dense_layers(tmp_path):
    model = built("lfm2_moe", num_dense_layers=2, routed_scaling_factor=1.5)
    model.model.layers[2].feed_forward.expert_bias += torch.arange(4.0)
    file, mlp = File(model, tmp_path), model.model.layers[2].feed_forward
    assert file.key("leading_dense_block_count") == 2
    assert file.key("feed_forward_length") == model.model.layers[0].feed_forward.w1.out_features
    assert file.key("expert_feed_forward_length") == 24
    assert file.key("expert_gating_func") == 2  # sigmoid
    assert same(file.tensors["blk.2.exp_probs_b.bias"], mlp.expert_bias)
    assert same(file.tensors["blk.2.ffn_up_exps.weight"], mlp.experts.gate_up_proj[:, 24:])
    assert same(file.tensors["blk.2.ffn_down_exps.weight"], 1.5 * mlp.experts.down_proj)


def test_a_removed_mlp_before_the_experts_is_a_short_one(tmp_path):
    file = File(cut(built("lfm2_moe"), "layers.0.mlp"), tmp_path)
    assert file.tensors["blk.0.ffn_down.weight"].shape == (48, 32)
    assert not file.tensors["blk.0.ffn_down.weight"].any()
    assert file.key("leading_dense_block_count") == 1


# Gated delta rules


def test_rows_of_qwen3_next_are_sorted_by_kind(tmp_path):
    """As its own code takes them apart."""
    model = built("qwen3_next")
    file, rule = File(model, tmp_path), model.model.layers[0].linear_attn
    each = (rule.in_proj_qkvz.weight.t()[None], rule.in_proj_ba.weight.t()[None])  # the hidden size as tokens
    query, key, value, gate, _, _ = (part[0].flatten(1).t() for part in rule.fix_query_key_value_ordering(*each))
    assert same(file.tensors["blk.0.attn_qkv.weight"], torch.cat((query, key, value)))
    assert same(file.tensors["blk.0.attn_gate.weight"], gate)
    assert same(file.tensors["blk.0.ssm_ba.weight"], rule.in_proj_ba.weight)
    assert same(file.tensors["blk.0.ssm_a"], -rule.A_log.exp())
    assert same(file.tensors["blk.0.ssm_norm.weight"], rule.norm.weight)
    assert same(file.tensors["blk.0.attn_norm.weight"], 1 + model.model.layers[0].input_layernorm.weight)
    assert same(file.tensors["output_norm.weight"], 1 + model.model.norm.weight)
    shared = model.model.layers[0].mlp.shared_expert_gate.weight
    assert same(file.tensors["blk.0.ffn_gate_inp_shexp.weight"], shared[0])


def test_value_heads_of_qwen35_are_dealt_out(tmp_path):
    """Of 6 value heads of 3 key heads, the file has the first of each, then the second of each."""
    model = built("qwen3_5_text", head_dim=32)
    file, rule = File(model, tmp_path), model.model.layers[0].linear_attn
    heads = [0, 2, 4, 1, 3, 5]
    rows = [8 * head + element for head in heads for element in range(8)]
    tensors = {name.removeprefix("blk.0."): values for name, values in file.tensors.items()}
    assert same(tensors["attn_qkv.weight"][:48], rule.in_proj_qkv.weight[:48])
    assert same(tensors["attn_qkv.weight"][48:], rule.in_proj_qkv.weight[48:][rows])
    assert same(tensors["ssm_conv1d.weight"][48:], rule.conv1d.weight[48:][rows, 0])
    assert same(tensors["attn_gate.weight"], rule.in_proj_z.weight[rows])
    assert same(tensors["ssm_alpha.weight"], rule.in_proj_a.weight[heads])
    assert same(tensors["ssm_beta.weight"], rule.in_proj_b.weight[heads])
    assert same(tensors["ssm_a"], -rule.A_log[heads].exp())
    assert same(tensors["ssm_dt.bias"], rule.dt_bias[heads])
    assert same(tensors["ssm_out.weight"], rule.out_proj.weight[:, rows])
    assert file.key("rope.dimension_count") == 8
    assert file.key("rope.dimension_sections") == [2, 1, 1, 0]


def test_the_file_lists_the_layers_of_delta_rules(tmp_path):
    model = cut(built("qwen3_5_text"), "layers.1.attention", "layers.1.mlp")
    file = File(model, tmp_path)
    assert file.key("attention.recurrent_layers") == [True, True, False]
    assert file.key("attention.head_count") == 6
    q = weight(model, "model.layers.3.self_attn.q_proj.weight")
    assert q.shape[0] == 2 * 6 * 8
    assert same(file.tensors["blk.2.attn_q.weight"], q)


# Packed models


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_of_a_packed_model_is_that_of_the_dense_one(family, tmp_path):
    for folder in ("dense", "packed"):
        (tmp_path / folder).mkdir()
    model = built(family)
    with torch.no_grad():  # values that bf16 holds exactly, so that packing rounds nothing
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    dense = File(model, tmp_path / "dense").tensors
    packed = pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    found = File(packed, tmp_path / "packed").tensors
    assert found.keys() == dense.keys()
    assert all((found[name] == dense[name]).all() for name in dense)
