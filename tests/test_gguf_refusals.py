"""Models that no container carries are refused, with the reason of each container that was tried."""

from __future__ import annotations

import pytest

from gguf_files import FAMILIES, LONGROPE, cut, dense, without
from pico import pico
from pliant.architecture import catalogue
from pliant.errors import ArtefactError
from pliant.exporters.gguf.containers import CONTAINERS, candidates, planned


@pytest.mark.parametrize(
    ("family", "gone", "reason"),
    [
        (
            "gemma2",
            (0,),
            "gemma2: layers.1.attention would be layer 0 of the file, where readers of gemma2 expect sliding_window: "
            "layers can only be removed by whole periods of 2",
        ),
        ("gemma3_text", (3,), "layers.5.attention would be layer 4 of the file, .* by whole periods of 6"),
        ("smollm3", (1, 2), "layers.3.attention would be layer 1 of the file, .* expect use_rope: .* periods of 4"),
        ("smollm3", (3,), "layers.4.attention would be layer 3 of the file, .* expect no use_rope"),
    ],
)
def test_a_removed_layer_that_shifts_a_pattern_is_refused(family, gone, reason):
    with pytest.raises(ArtefactError, match=f"no llama.cpp architecture carries this model: .*{reason}"):
        planned(cut(dense(family), without(*gone)))


LOCAL = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 8.0}}


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 20.0}, "gemma3 has no attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "gemma2 needs final_logit_softcapping"),
        ("llama", {"hidden_act": "gelu"}, "its MLPs have the activation gelu, and llama computes silu"),
        ("qwen3", {"rope_parameters": LONGROPE}, "qwen3 does not read rope_factors_long.weight, rope_factors_short"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe divides the shares of the chosen experts by their sum"),
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2moe does not divide the shares of the chosen experts"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "layers.1.mlp has no experts, as every layer of qwen2moe has"),
        ("olmoe", {"clip_qkv": 8.0}, "olmoe has no clip_qkv"),
        ("olmoe", {"num_key_value_heads": 3}, "olmoe has a key-value head for every head"),
        ("stablelm", {"use_parallel_residual": True}, "stablelm with parallel blocks is not written"),
        ("starcoder2", {"use_bias": False}, "starcoder2 needs biases"),
        ("gemma3_text", {"rope_parameters": LOCAL}, "gemma3 has no keys for its rotary positions"),
        ("smollm3", {"attention_bias": True}, "self_attn.q_proj has a bias, and smollm3 has none there"),
    ],
)
def test_models_that_readers_would_compute_otherwise_are_refused(family, overrides, reason):
    with pytest.raises(ArtefactError, match=reason):
        planned(dense(family, **overrides))


@pytest.mark.parametrize(
    ("family", "skip", "keep", "reason"),
    [
        ("gemma", ["layers.1.attention"], {}, "layers.1.mlp has no attention beside it, as every layer of gemma has"),
        ("gemma", ["layers.1.mlp"], {}, "layers.1.attention has no MLP beside it, as every layer of gemma has"),
        ("gemma", [], {"a1_kv": 2}, "its numbers of heads differ from layer to layer, and gemma has one for all"),
        ("olmo2", [], {"m1_channels": 8}, "its MLP widths differ from layer to layer"),
        ("mixtral", [], {"m1_experts": 3}, "its numbers of experts differ from layer to layer"),
        ("qwen3", [], {"m1_channels": 8}, "qwen3: its MLP widths differ .*; openelm: its output head is not its emb"),
        (
            "qwen2_moe",
            [],
            {f"a{n}_kv": 2 for n in range(4)},
            "it has 4 heads of 8, which qwen2moe cannot carry in a hidden size of 48",
        ),
        ("phi3", [], {f"a{n}_kv": 2 for n in range(4)}, None),  # deci carries it
        ("qwen2", [], {f"a{n}_kv": 2 for n in range(4)}, None),
    ],
)
def test_shapes_that_no_container_carries_are_refused(family, skip, keep, reason):
    model = cut(dense(family), skip, **keep)
    if reason is None:
        assert planned(model).architecture == "deci"
    else:
        with pytest.raises(ArtefactError, match=f"no llama.cpp architecture carries this model: .*{reason}"):
            planned(model)


def test_a_model_without_an_output_head_is_refused():
    with pytest.raises(ArtefactError, match="llama: it has no output head; deci: it has no output head"):
        planned(dense("llama").model)


def test_families_without_a_container_are_refused():
    with pytest.raises(ArtefactError, match=r"no container for opt models; choose from: .*gemma2, .*llama, "):
        planned(pico("opt"))


def test_the_table_of_containers():
    loaded = {name: entry.load() for name, entry in CONTAINERS.items()}
    families = [family for container in loaded.values() for family in container.models]
    described = {family for architecture in catalogue().values() for family in architecture.models}
    assert set(families) <= described
    assert set(FAMILIES) <= set(families)
    assert [container.name for container in candidates("qwen2")] == ["qwen2", "deci"]
    assert [container.name for container in candidates("qwen3")] == ["qwen3", "openelm"]
    assert not list(candidates("opt"))
