"""The files of hybrids of scans, convolutions or delta rules with attention, read back."""

from __future__ import annotations

import pytest
import torch

import pliant
from gguf_files import File, halves, weight
from gguf_hybrids import ATTENTION, EXPERTS, FAMILIES, MLP, NEWEST, NORMS, SHARED, built, cut, same
from pliant.errors import ArtefactError
from pliant.exporters.gguf.containers import planned

pytest.importorskip("gguf")
pytestmark = NEWEST


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


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "lfm2_moe"])
def test_a_model_without_experts_is_refused(family):
    layers = [layer for layer in range(4) if family != "lfm2_moe" or layer]
    with pytest.raises(ArtefactError, match="no experts are left"):
        planned(cut(built(family), *[f"layers.{layer}.mlp" for layer in layers]))


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
    packed = pliant.apply(model, pliant.PackedLinear(format="bf16", head="bf16"), progress=False)
    found = File(packed, tmp_path / "packed").tensors
    dense.setdefault("output.weight", dense["token_embd.weight"])  # a packed head is a matrix of its own
    assert found.keys() == dense.keys()
    assert [name for name in dense if (found[name] != dense[name]).any()] == []
