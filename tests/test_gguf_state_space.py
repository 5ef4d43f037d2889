"""The files of state-space models, read back: names, shapes, values and what each layer is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gguf_files import File, weight
from gguf_hybrids import FAMILIES, NEWEST, built, cut, same
from pliant.errors import ArtefactError
from pliant.exporters.gguf.containers import planned

pytest.importorskip("gguf")
pytestmark = NEWEST


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


def with_experts(pattern="ME*M*E", **overrides):
    return built(
        "nemotron_h",
        hybrid_override_pattern=pattern,
        num_hidden_layers=len(pattern),
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        **overrides,
    )


@pytest.mark.parametrize("latent", [None, 20])
def test_experts_of_nemotron_h(latent, tmp_path):
    model = with_experts(moe_latent_size=latent, routed_scaling_factor=1.5)
    block = model.model.layers[1].mixer
    block.gate.e_score_correction_bias += torch.arange(4.0)
    file = File(model, tmp_path)
    assert file.architecture == "nemotron_h_moe"
    assert file.key("feed_forward_length") == [0, 24, 0, 0, 0, 24]
    assert file.key("expert_feed_forward_length") == 24  # one number, for older readers
    assert [file.key(f"expert_{name}") for name in ("count", "used_count", "shared_feed_forward_length")] == [4, 2, 40]
    assert file.key("expert_weights_norm") is True
    assert file.key("expert_weights_scale") == 1.5
    assert file.key("moe_latent_size") == latent
    tensors = {name.removeprefix("blk.1."): values for name, values in file.tensors.items()}
    assert same(tensors["exp_probs_b.bias"], block.gate.e_score_correction_bias)
    assert same(tensors["ffn_gate_inp.weight"], block.gate.weight)
    assert same(tensors["ffn_up_exps.weight"], block.experts.up_proj)
    assert same(tensors["ffn_down_exps.weight"], block.experts.down_proj)
    assert same(tensors["ffn_up_shexp.weight"], block.shared_experts.up_proj.weight)
    assert same(tensors["ffn_down_shexp.weight"], block.shared_experts.down_proj.weight)
    if latent:
        assert same(tensors["ffn_latent_down.weight"], block.fc1_latent_proj.weight)
        assert same(tensors["ffn_latent_up.weight"], block.fc2_latent_proj.weight)


def test_widths_of_experts_differ_from_layer_to_layer(tmp_path):
    """The larger residual stream of a cut scan comes from the last matrix of each block."""
    model = cut(with_experts(moe_latent_size=20), moe_wide_5=8, mamba_scan=2)
    file, block = File(model, tmp_path), model.model.layers[5].mixer
    assert file.key("feed_forward_length") == file.key("expert_feed_forward_length") == [0, 24, 0, 0, 0, 8]
    assert same(file.tensors["blk.5.ffn_down_exps.weight"], block.experts.down_proj)
    assert same(file.tensors["blk.5.ffn_latent_up.weight"], 2 * block.fc2_latent_proj.weight)
    assert same(file.tensors["blk.5.ffn_down_shexp.weight"], 2 * block.shared_experts.down_proj.weight)


@pytest.mark.parametrize(
    ("pattern", "overrides", "keep", "reason"),
    [
        ("ME*M*-", {}, {}, "layers.5.mlp has no experts, as every MLP of nemotron_h_moe has"),
        ("ME*M*E", {"n_group": 2}, {}, "its experts are chosen in 2 groups"),
        ("ME*M*E", {}, {"moe_experts_1": 3}, r"differ from layer to layer \(router: \[3, 4\]\)"),
        ("ME*M*E", {}, {"moe_shared_1": 8}, r"differ from layer to layer \(shared_up: \[8, 40\]\)"),
        ("ME*M*E", {"mlp_bias": True}, {}, "shared_experts.up_proj has a bias, and nemotron_h_moe has none there"),
    ],
)
def test_experts_that_readers_do_not_know_are_refused(pattern, overrides, keep, reason):
    with pytest.raises(ArtefactError, match=reason):
        planned(cut(with_experts(pattern, **overrides), **keep))


def test_removed_layers_of_mamba_leave_nothing(tmp_path):
    model = cut(built("mamba2"), "layers.0.mamba", "layers.2.mamba")
    file = File(model, tmp_path)
    assert file.key("block_count") == 2
    assert file.key("attention.head_count") == file.key("feed_forward_length") == 0
    assert same(file.tensors["blk.1.ssm_in.weight"], model.backbone.layers[3].mixer.in_proj.weight)


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
    larger = math.sqrt(model.config.layer_norm_epsilon / model.config.mixer_rms_eps) if normed else 1
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
