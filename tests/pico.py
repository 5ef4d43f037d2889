"""Tiny models of every listed architecture, built in the test. Random weights, large enough to matter."""

from __future__ import annotations

import torch
import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.olmo_hybrid import modeling_olmo_hybrid

from pliant.architecture import catalogue
from pliant.elastic import Subnet

DECODERS = (
    *("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"),
    *("mistral", "gemma", "gemma3_text", "granite", "smollm3", "olmo2", "starcoder2", "stablelm", "phi"),
    *("opt", "gpt_neox", "falcon", "bloom", "mixtral", "qwen3_moe"),
)
ENCODERS = ("bert", "roberta", "distilbert", "vit")
ARCHITECTURES = (*DECODERS, *ENCODERS)
FAMILIES = (  # each is one more use of words that are tried on the above: see test_families.py
    *("glm4", "gptj", "gpt_neo", "persimmon", "xglm", "ctrl", "gpt_bigcode", "mpt", "diffllama", "bitnet", "lfm2"),
    *("olmoe", "flex_olmo", "granitemoe", "granitemoeshared", "phimoe", "gpt_oss", "qwen2_moe", "mellum", "dots1"),
    *("glm4_moe", "deepseek_v3", "minimax_m2", "hunyuan_v1_moe", "ernie4_5_moe", "xlm-roberta", "camembert"),
    *("mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1", "jamba"),
    *("lfm2_moe", "kimi_linear", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "zamba2"),
)
SCANS = hasattr(modeling_mamba2, "mamba2_chunk_scan")
"""Whether the scans of this transformers are functions, which pliant replaces; in 5.14 they are not."""
OTHERWISE = {  # families that this transformers does not have, or whose modules are others there, which are refused
    *(() if "kimi_linear" in transformers.CONFIG_MAPPING else ("kimi_linear",)),
    *(("olmo_hybrid",) if hasattr(modeling_olmo_hybrid, "OlmoHybridDynamicCache") else ()),
    *(() if SCANS else ("zamba2",)),
}
FAMILIES = tuple(name for name in FAMILIES if name not in OTHERWISE)
LAYOUTS = (  # where a run over every family would take too long: every trick that an architecture file can describe
    *("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"),
    *("opt", "gpt_neox", "falcon", "mixtral", "gemma3_text"),
)
VOCABULARY = 300
IDS = torch.tensor([[5, 17, 101, 3, 77, 250, 9, 41, 12], [8, 8, 30, 299, 61, 4, 19, 23, 150]])

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_HEAD_DIM = {"hidden_size": 48, "head_dim": None}  # heads as wide as hidden size and their number make them
_OWN_HEADS = {**_NO_HEAD_DIM, "num_key_value_heads": None}  # every query head has keys and values of its own
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
_OWN = {
    "llama": {"hidden_size": 36},
    "gemma2": {"hidden_size": 36, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SLIDING, "hidden_size": 36, "query_pre_attn_scalar": 8},
    "smollm3": {**_NO_HEAD_DIM, "no_rope_layers": [1, 0, 1, 1]},
    "olmo2": _NO_HEAD_DIM,
    "starcoder2": _NO_HEAD_DIM,
    "granite": {**_NO_HEAD_DIM, "residual_multiplier": 0.5},
    "stablelm": {**_NO_HEAD_DIM, "use_qkv_bias": True},
    "phi3": _NO_HEAD_DIM,
    "qwen2": _NO_HEAD_DIM,
    "phi": _NO_HEAD_DIM,
    "gpt_neox": {**_OWN_HEADS, "intermediate_size": 80},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "bert": _OWN_HEADS,
    "roberta": _OWN_HEADS,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "bloom": {"hidden_size": 48, "n_layer": 4, "n_head": 4},
    "falcon": {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_kv_heads": 3}
    | {"new_decoder_architecture": True},
    "opt": {"hidden_size": 48, "ffn_dim": 40, "num_hidden_layers": 4, "num_attention_heads": 6}
    | {"word_embed_proj_dim": 48, "max_position_embeddings": 256},
    "distilbert": {"dim": 48, "hidden_dim": 40, "n_layers": 4, "n_heads": 6, "max_position_embeddings": 256},
    "vit": {**_OWN_HEADS, "image_size": 16, "patch_size": 4, "num_channels": 3},
}
_OWN_KEYS_ONLY = ("gpt2", "bloom", "falcon", "opt", "distilbert")
_SPECIAL = {key: _SHAPE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
_SCAN = {"hidden_size": 32, "num_hidden_layers": 4, "conv_kernel": 4}
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
_ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_MAMBA2 = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 10, "mamba_n_groups": 2, "mamba_chunk_size": 8}
_DELTA = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 8}
_DELTA |= {"linear_value_head_dim": 10, "layer_types": ["linear_attention", "full_attention"] * 2}
_SHARED = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
_N = {"n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 256}
_OWN |= {
    "glm4": {"hidden_size": 36, "partial_rotary_factor": 0.5},
    "gptj": {**_N, "rotary_dim": 4, "n_inner": 40},
    "gpt_neo": {"hidden_size": 48, "num_layers": 4, "num_heads": 6, "attention_types": [[["global", "local"], 2]]}
    | {"window_size": 6, "max_position_embeddings": 256, "intermediate_size": 40},
    "persimmon": {**_NO_HEAD_DIM, "qk_layernorm": True},
    "xglm": {"d_model": 48, "ffn_dim": 40, "num_layers": 4, "attention_heads": 6, "max_position_embeddings": 256},
    "ctrl": {**_N, "dff": 40},
    "gpt_bigcode": {**_N, "n_inner": 40},
    "mpt": {"d_model": 48, "n_heads": 6, "n_layers": 4, "max_seq_len": 256},
    "diffllama": {**_NO_HEAD_DIM, "num_attention_heads": 12, "num_key_value_heads": 6},
    "bitnet": {"hidden_size": 48},
    "lfm2": {"hidden_size": 48, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"hidden_size": 48, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}
    | {**_FOUR, "moe_intermediate_size": 24},
    "olmoe": {**_NO_HEAD_DIM, **_FOUR},
    "flex_olmo": {**_NO_HEAD_DIM, **_FOUR},
    "granitemoe": {**_NO_HEAD_DIM, **_LOCAL},
    "granitemoeshared": {**_NO_HEAD_DIM, **_LOCAL, "shared_intermediate_size": 40},
    "phimoe": {**_NO_HEAD_DIM, **_LOCAL},
    "gpt_oss": {**_LOCAL, "sliding_window": 6},
    "qwen2_moe": {**_NO_HEAD_DIM, **_FOUR, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    | {"shared_expert_intermediate_size": 40},
    "mellum": {**_FOUR, "moe_intermediate_size": 24},
    "dots1": _ROUTED,
    "glm4_moe": _ROUTED,
    "deepseek_v3": {**_ROUTED, "head_dim": None, "num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "kimi_linear": {
        **_NO_HEAD_DIM,
        "num_key_value_heads": 6,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
    }
    | {"qk_nope_head_dim": 8, "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 24}
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_heads": 5, "linear_head_dim": 8},
    "minimax_m2": _LOCAL,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "ernie4_5_moe": {**_NO_HEAD_DIM, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}
    | {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "mamba": {**_SPECIAL, **_SCAN, "state_size": 6, "time_step_rank": 4},
    "falcon_mamba": {**_SPECIAL, **_SCAN, "state_size": 6, "time_step_rank": 4},
    "mamba2": {**_SPECIAL, **_SCAN, "state_size": 10, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "bamba": {**_NO_HEAD_DIM, **_MAMBA2, "attn_layer_indices": [1, 3]},
    "nemotron_h": {**_SPECIAL, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 6, "head_dim": 8}
    | {"num_key_value_heads": 3, "hybrid_override_pattern": "M-*M*-", "num_hidden_layers": 6, "mamba_num_heads": 8}
    | {"mamba_head_dim": 8, "ssm_state_size": 10, "n_groups": 2, "chunk_size": 8},
    # time_step_min: with a larger one, the cache of transformers is not exact
    "zamba2": {**_SPECIAL, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "n_mamba_heads": 8}
    | {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid", "hybrid"] * 2, "num_mem_blocks": 2}
    | {"use_shared_attention_adapter": True, "adapter_rank": 4, "use_mem_rope": True, "max_position_embeddings": 256}
    | {"mamba_ngroups": 2, "mamba_d_state": 10, "chunk_size": 8, "time_step_min": 1e-30},
    "granitemoehybrid": {**_NO_HEAD_DIM, **_LOCAL, **_MAMBA2, "shared_intermediate_size": 40}
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "position_embedding_type": "rope"}
    | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 96, "mamba_rms_norm": True, "mamba_norm_before_gate": False}
    | {"ssm_multipliers": [0.5, 2.0, 1.5, 0.75, 1.25], "mlp_multipliers": [1.5, 0.5], "key_multiplier": 0.5}
    | {"ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.5, "attention_in_multiplier": 0.75}
    | {"attention_out_multiplier": 1.25, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
    "jamba": {**_NO_HEAD_DIM, **_FOUR, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3}
    | {"mamba_d_state": 6, "mamba_dt_rank": 5},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_FOUR, **_SHARED},
    "qwen3_next": {**_DELTA, **_FOUR, **_SHARED, "mlp_only_layers": [1]},
    "olmo_hybrid": {**_DELTA, **_NO_HEAD_DIM},
    "xlm-roberta": _OWN_HEADS,
    "camembert": _OWN_HEADS,
}
_OWN_KEYS_ONLY += (
    "gptj",
    "gpt_neo",
    "xglm",
    "ctrl",
    "gpt_bigcode",
    "mpt",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "nemotron_h",
    "zamba2",
)


def config(name: str = "llama", **overrides):
    """A small config of a family, all sizes different from each other."""
    shape = _SPECIAL if name in _OWN_KEYS_ONLY else _SHAPE
    given = shape | _OWN.get(name, {})
    if depth := overrides.get("num_hidden_layers"):  # what is told layer by layer goes on as it began
        given |= {key: (given[key] * depth)[:depth] for key in ("layer_types", "no_rope_layers") if key in given}
    given |= overrides
    return transformers.AutoConfig.for_model(name, **{key: value for key, value in given.items() if value is not None})


def pico(name: str = "llama", seed: int = 0, **overrides):
    """A model whose every weight, biases and norms included, differs from its neighbours."""
    torch.manual_seed(seed)
    model = head_of(name).from_config(config(name, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def head_of(name: str):
    """The auto class of a family's models with a head."""
    if name == "vit":
        return transformers.AutoModelForImageClassification
    encodes = name in (*ENCODERS, "xlm-roberta", "camembert")
    return transformers.AutoModelForSequenceClassification if encodes else transformers.AutoModelForCausalLM


def inputs(model, ids=IDS):
    """What a model reads: token ids; random images where it sees."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": ids, "use_cache": False} if model.can_generate() else {"input_ids": ids}


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(**inputs(model, ids)).logits


def tokenizer():
    """One token a byte, ids 3 … 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(alphabet)}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def leader(name: str) -> str:
    """The axis that attention heads are chosen by."""
    return next(axis for axis in catalogue()[name].axes if axis in ("kv", "heads"))


def cases(cuts, names=ARCHITECTURES):
    """(family, name of a cut) for each cut of which something is left when it is fitted to the family.

    Arguments:
        cuts: name -> function of the axis of heads that gives a sub-network.
    """

    def can(name, axis):
        known = catalogue()[name].axes
        return axis in known and known[axis].cut

    return [
        (name, kind)
        for name in names
        for kind, cut in cuts.items()
        if cut(leader(name)).skip or any(can(name, axis.split(".")[-1]) for axis, _ in cut(leader(name)).keep)
    ]


def fitted(subnet, anatomy):
    """The same cut as far as a family allows it: axes that it cannot choose stay full, numbers are rounded to allowed
    ones."""
    keep = {}
    for name, units in subnet.keep:
        if name in anatomy.axes:
            axis = anatomy.axes[name]
            allowed = [fewer for fewer in range(1, axis.size) if axis.allows(fewer)]
            keep |= {name: min(allowed, key=lambda fewer: abs(fewer - units))} if allowed else {}
    return Subnet(subnet.skip, tuple(sorted(keep.items())))


@st.composite
def subnets(draw, anatomy):
    """Any sub-network of a model of four layers that keeps one attention of each type."""
    subnet = Subnet()
    for block in anatomy.blocks.values():
        attention_stays = block.layer >= 2 and block.kind == "attention"
        if draw(st.booleans()) and not attention_stays:
            subnet = subnet.without(block.name)
        else:
            for axis in block.leaders:
                sizes = [units for units in range(1, axis.size + 1) if axis.allows(units)]
                subnet = subnet.keeping(axis.name, draw(st.sampled_from(sizes)))
    return subnet
