"""Tiny models of every listed architecture, built in the test. Random weights, large enough to matter."""

from __future__ import annotations

import torch
import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pliant.elastic import Subnet

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2")
VOCABULARY = 300


def config(name: str = "llama", **overrides):
    shape = {
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
    match name:
        case "gpt2":
            gpt2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
            return transformers.GPT2Config(**gpt2 | {"bos_token_id": 1, "eos_token_id": 2} | overrides)
        case "gemma2":
            return transformers.Gemma2Config(
                **shape | {"hidden_size": 36, "sliding_window": 6, "query_pre_attn_scalar": 8} | overrides
            )
        case "phi3":
            del shape["head_dim"]
            return transformers.Phi3Config(**shape | {"hidden_size": 48} | overrides)
        case "llama":
            return transformers.LlamaConfig(**shape | {"hidden_size": 36} | overrides)
        case "qwen2":
            del shape["head_dim"]
            return transformers.Qwen2Config(**shape | {"hidden_size": 48} | overrides)
        case "qwen3":
            return transformers.Qwen3Config(**shape | overrides)
    raise ValueError(name)


def pico(name: str = "llama", seed: int = 0, **overrides):
    """A model whose every weight, biases and norms included, differs from its neighbours."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(name, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


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
    return "heads" if name == "gpt2" else "kv"


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
                subnet = subnet.keeping(axis.name, draw(st.integers(1, axis.size)))
    return subnet
