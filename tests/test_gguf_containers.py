"""The files of every container, read back: names, shapes and values against the model's own weights."""

from __future__ import annotations

import numpy as np
import pytest

from gguf_files import FAMILIES, LONGROPE, File, cut, dense, halves, weight, without

pytest.importorskip("gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_written_in_its_own_architecture(family, tmp_path):
    model = dense(family)
    file = File(model, tmp_path)
    _, architecture, names = FAMILIES[family]
    assert file.architecture == architecture
    assert file.key("block_count") == model.config.num_hidden_layers
    assert {name for name in file.layer(0) if not name.endswith(".bias")} == set(names)
    assert file.layer(model.config.num_hidden_layers - 1) == file.layer(0)
    for number in range(model.config.num_hidden_layers):
        norms = [name for name in file.tensors if name.startswith(f"blk.{number}.") and "norm" in name]
        assert len({file.tensors[name].tobytes() for name in norms}) == len(norms)  # none is written twice
    assert file.key("embedding_length") == model.config.hidden_size
    assert file.key("attention.key_length") == file.key("attention.value_length") == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_a_model_is_in_its_file(family, tmp_path):
    """Sums of squares: of the file without a repeated embedding, and of the model with the 1 of Gemma's norms."""
    model = dense(family)
    file = File(model, tmp_path)
    shift = 1.0 if family.startswith("gemma") else 0.0
    of_model = {
        name: (values + shift if name.endswith("norm.weight") else values).double().square().sum().item()
        for name, values in model.named_parameters()
    }
    of_file = {name: float((values.astype(np.float64) ** 2).sum()) for name, values in file.tensors.items()}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        of_file.pop("output.weight", None)
    assert sum(of_file.values()) == pytest.approx(sum(of_model.values()), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "mixtral", "granitemoe", "smollm3"])
def test_q_and_k_are_turned_to_pairs(family, tmp_path):
    model = dense(family)
    file = File(model, tmp_path)
    for role, heads in (("q", 6), ("k", 3)):
        own = weight(model, f"model.layers.1.self_attn.{role}_proj.weight")
        assert (file.tensors[f"blk.1.attn_{role}.weight"] != own).any()
        assert (halves(file.tensors[f"blk.1.attn_{role}.weight"], heads) == own).all()
    own = weight(model, "model.layers.1.self_attn.v_proj.weight")
    assert (file.tensors["blk.1.attn_v.weight"] == own).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "olmo2", "glm4", "starcoder2", "qwen3_moe"])
def test_q_is_not_turned_where_readers_rotate_as_the_model_does(family, tmp_path):
    model = dense(family)
    own = weight(model, "model.layers.1.self_attn.q_proj.weight")
    assert (File(model, tmp_path).tensors["blk.1.attn_q.weight"] == own).all()


def test_heads_and_widths_of_deci_differ_from_layer_to_layer(tmp_path):
    model = cut(dense("llama"), ["layers.1.attention", "layers.2.mlp"], a2_kv=1, m0_channels=16, m3_channels=8)
    file = File(model, tmp_path)
    assert file.architecture == "deci"
    assert file.key("attention.head_count") == [6, 0, 2, 6]
    assert file.key("attention.head_count_kv") == [3, 0, 1, 3]
    assert file.key("feed_forward_length") == [16, 48, 32, 8]
    assert file.layer(1) == {"ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
    assert file.plan.notes == ["layer 2 of the file has an MLP of 32 channels that adds nothing"]
    assert not file.tensors["blk.2.ffn_down.weight"].any()
    own = weight(model, "model.layers.2.self_attn.q_proj.weight")
    assert (halves(file.tensors["blk.2.attn_q.weight"], 2) == own).all()


def test_an_attention_and_the_mlp_of_a_later_layer_become_one(tmp_path):
    model = cut(dense("qwen2"), ["layers.1.mlp", "layers.2.attention"])
    file = File(model, tmp_path)
    assert file.architecture == "qwen2"
    assert file.key("block_count") == 3
    assert (file.tensors["blk.1.attn_v.weight"] == weight(model, "model.layers.1.self_attn.v_proj.weight")).all()
    assert (file.tensors["blk.1.attn_v.bias"] == weight(model, "model.layers.1.self_attn.v_proj.bias")).all()
    assert (file.tensors["blk.1.ffn_up.weight"] == weight(model, "model.layers.2.mlp.up_proj.weight")).all()


def test_uneven_qwen3_is_written_as_openelm(tmp_path):
    model = cut(dense("qwen3", tie_word_embeddings=True), ["layers.1.attention"], a2_kv=1, m0_channels=16)
    file = File(model, tmp_path)
    assert file.architecture == "openelm"
    assert file.key("attention.head_count") == [6, 1, 2, 6]
    assert not file.tensors["blk.1.attn_output.weight"].any()
    names = [f"model.layers.2.self_attn.{role}_proj.weight" for role in "qkv"]
    assert (file.tensors["blk.2.attn_qkv.weight"] == np.concatenate([weight(model, name) for name in names])).all()


def test_rows_of_fused_weights_are_found(tmp_path):
    model = cut(dense("phi3"), a1_kv=2, m1_channels=16)
    file = File(model, tmp_path)
    assert file.architecture == "deci"
    own = weight(model, "model.layers.1.self_attn.qkv_proj.weight")  # 4 heads, 2 of keys, 2 of values
    assert (halves(file.tensors["blk.1.attn_q.weight"], 4) == own[:32]).all()
    assert (halves(file.tensors["blk.1.attn_k.weight"], 2) == own[32:48]).all()
    assert (file.tensors["blk.1.attn_v.weight"] == own[48:]).all()
    own = weight(model, "model.layers.1.mlp.gate_up_proj.weight")
    assert (file.tensors["blk.1.ffn_gate.weight"] == own[:16]).all()
    assert (file.tensors["blk.1.ffn_up.weight"] == own[16:]).all()


def test_fused_weights_stay_fused_in_phi3(tmp_path):
    model = dense("phi3")
    file = File(model, tmp_path)
    for name, own in {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}.items():
        assert (file.tensors[f"blk.2.{name}.weight"] == weight(model, f"model.layers.2.{own}.weight")).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe"])
def test_stacks_of_experts_are_split(family, tmp_path):
    model = dense(family)
    keep = {f"m{layer}_{axis}": units for layer in range(4) for axis, units in (("experts", 3), ("channels", 16))}
    file = File(cut(model, without(1), **{k: v for k, v in keep.items() if k[1] != "1"}), tmp_path)
    block = "model.layers.2." + ("block_sparse_moe" if family == "granitemoe" else "mlp")
    fused, down = weight(model, f"{block}.experts.gate_up_proj"), weight(model, f"{block}.experts.down_proj")
    assert fused.shape[:2] == (3, 32)
    assert (file.tensors["blk.1.ffn_gate_exps.weight"] == fused[:, :16]).all()
    assert (file.tensors["blk.1.ffn_up_exps.weight"] == fused[:, 16:]).all()
    assert (file.tensors["blk.1.ffn_down_exps.weight"] == down).all()
    assert file.tensors["blk.1.ffn_gate_inp.weight"].shape == (3, model.config.hidden_size)
    assert (file.key("block_count"), file.key("expert_count"), file.key("expert_used_count")) == (3, 3, 2)
    assert file.key("expert_feed_forward_length") == file.key("feed_forward_length") == 16


def test_a_shared_expert_and_its_router(tmp_path):
    model = dense("qwen2_moe")
    file = File(model, tmp_path)
    assert file.key("expert_shared_feed_forward_length") == 40
    own = weight(model, "model.layers.0.mlp.shared_expert_gate.weight")
    assert (file.tensors["blk.0.ffn_gate_inp_shexp.weight"] == own[0]).all()


def test_norms_of_gemma_contain_their_one(tmp_path):
    model = dense("gemma2")
    file = File(model, tmp_path)
    names = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
    for name, own in names.items():
        assert (file.tensors[f"blk.3.{name}.weight"] == weight(model, f"model.layers.3.{own}.weight") + 1).all()
    assert (file.tensors["output_norm.weight"] == weight(model, "model.norm.weight") + 1).all()
    assert (file.key("attention.sliding_window"), file.key("context_length")) == (6, 256)
    assert (file.key("attn_logit_softcapping"), file.key("final_logit_softcapping")) == (50, 30)


@pytest.mark.parametrize(("depth", "reader"), [(4, 8), (46, 36 / 6)])
def test_the_scale_that_readers_of_gemma2_do_not_know_is_in_q(depth, reader, tmp_path):
    """They scale by the width of a head; in a file of 46 layers, by hidden size and heads."""
    model = dense("gemma2", query_pre_attn_scalar=11, num_hidden_layers=depth)
    own = weight(model, "model.layers.2.self_attn.q_proj.weight")
    found = File(model, tmp_path).tensors["blk.2.attn_q.weight"]
    assert found == pytest.approx(own * (11**-0.5 / reader**-0.5), rel=1e-6)


def test_the_scale_that_readers_of_gemma3_do_not_know_is_in_the_norm_of_q(tmp_path):
    model = dense("gemma3_text", query_pre_attn_scalar=11)
    file = File(model, tmp_path)
    own = weight(model, "model.layers.2.self_attn.q_norm.weight")
    assert file.tensors["blk.2.attn_q_norm.weight"] == pytest.approx((own + 1) * (11**-0.5 / 8**-0.5), rel=1e-6)
    own = weight(model, "model.layers.2.self_attn.k_norm.weight")
    assert (file.tensors["blk.2.attn_k_norm.weight"] == own + 1).all()
    assert (file.key("rope.freq_base"), file.key("rope.freq_base_swa")) == (1e6, 1e4)


CONSTANTS = {"attention_multiplier": 0.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.25}
CONSTANTS |= {"logits_scaling": 4.0}


def test_constants_of_granite_have_keys(tmp_path):
    model = dense("granite", **CONSTANTS)
    file = File(model, tmp_path)
    keys = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    assert [file.key(key) for key in keys] == list(CONSTANTS.values())
    assert (file.tensors["token_embd.weight"] == weight(model, "model.embed_tokens.weight")).all()


@pytest.mark.parametrize("tied", [True, False])
def test_constants_of_granite_are_in_the_weights_of_deci(tied, tmp_path):
    model = cut(dense("granite", tie_word_embeddings=tied, **CONSTANTS), m1_channels=8)
    file = File(model, tmp_path)
    assert file.architecture == "deci"
    head = ("output_norm", "model.norm", 1 / 12) if tied else ("output", "lm_head", 1 / 4)
    norm = ("output_norm", "model.norm", 1 / 12 if tied else 1.0)
    for name, own, factor in (
        ("token_embd", "model.embed_tokens", 3.0),
        ("blk.0.attn_output", "model.layers.0.self_attn.o_proj", 0.25),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", 0.25),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj", 1.0),
        head,
        norm,
    ):
        assert file.tensors[f"{name}.weight"] == pytest.approx(weight(model, f"{own}.weight") * factor, rel=1e-6)
    q = halves(file.tensors["blk.0.attn_q.weight"], 6)
    assert q == pytest.approx(weight(model, "model.layers.0.self_attn.q_proj.weight") * 0.5 * 8**0.5, rel=1e-6)
    assert ("output.weight" in file.tensors) is not tied


def test_an_architecture_that_needs_a_head_has_the_embedding_twice(tmp_path):
    file = File(dense("olmo2", tie_word_embeddings=True), tmp_path)
    assert (file.tensors["output.weight"] == file.tensors["token_embd.weight"]).all()


def test_layer_norms_have_biases(tmp_path):
    model = dense("starcoder2")
    file = File(model, tmp_path)
    own = weight(model, "model.layers.1.input_layernorm.bias")
    assert (file.tensors["blk.1.attn_norm.bias"] == own).all()
    assert (file.tensors["output_norm.bias"] == weight(model, "model.norm.bias")).all()
    assert file.key("attention.layer_norm_epsilon") == pytest.approx(model.config.norm_epsilon)
    assert file.key("attention.layer_norm_rms_epsilon") is None


@pytest.mark.parametrize(
    ("family", "gone", "depth"),
    [("gemma2", (2, 3), 2), ("gemma3_text", range(6), 6), ("smollm3", range(4, 8), 4), ("smollm3", (), 8)],
)
def test_whole_periods_of_layers_can_be_removed(family, gone, depth, tmp_path):
    assert File(cut(dense(family), without(*gone)), tmp_path).key("block_count") == depth


def test_positions_of_long_texts(tmp_path):
    file = File(dense("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64), tmp_path)
    assert file.tensors["rope_factors_long.weight"].tolist() == LONGROPE["long_factor"]
    assert file.tensors["rope_factors_short.weight"].tolist() == LONGROPE["short_factor"]
    assert file.key("rope.scaling.type") == "longrope"
    assert file.key("rope.scaling.attn_factor") == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)  # 256 / 64
    assert any("room for more than 64 tokens" in note for note in file.plan.notes)


def test_a_window_that_readers_do_not_know_limits_the_context(tmp_path):
    file = File(dense("phi3", sliding_window=32), tmp_path)
    assert file.key("context_length") == 32
    assert "its attention reads 32 tokens" in file.plan.notes[0]
