"""Scaled rotary positions survive a GGUF file, which transformers alone reads without them."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import pliant

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def model_with(**rope):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
            max_position_embeddings=256,
            initializer_range=0.3,
            rope_parameters={"rope_theta": 5e5} | rope,
        )
    ).eval()


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(200).view(1, -1) % 40).logits


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, LLAMA3, YARN])
def test_scaled_positions_survive(tmp_path, rope):
    model = model_with(**rope)
    path = pliant.export(model, tmp_path / "a.gguf", to="gguf", type="f32")
    loaded = pliant.load(path, dtype="float32")
    assert loaded.config.rope_parameters["rope_type"] == rope["rope_type"]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "folder")
    again = pliant.load(tmp_path / "folder", dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_windows_of_gemma_are_not_scaled(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=40,
        sliding_window=64,
        query_pre_attn_scalar=32,
        rope_parameters=rope,
    )
    path = pliant.export(Gemma3ForCausalLM(config).eval(), tmp_path / "a.gguf", to="gguf", type="f32")
    assert pliant.load(path).config.rope_parameters == rope


def copied(path, out, *, keys=(), divisors=None):
    """A copy of a file with other keys, and other divisors of frequencies."""
    reader, writer = GGUFReader(path), GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, value in keys:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("keys", "divisors"),
    [
        ((), np.linspace(1, 8, 16)),
        ((("llama.rope.scaling.type", "longrope"),), None),
        ((("llama.rope.scaling.type", "yarn"), ("llama.rope.scaling.yarn_ext_factor", 0.5)), None),
    ],
)
def test_unknown_scaling_is_said(tmp_path, keys, divisors):
    path = pliant.export(model_with(), tmp_path / "a.gguf", to="gguf", type="f32")
    path = copied(path, tmp_path / "b.gguf", keys=keys, divisors=divisors)
    with pytest.warns(UserWarning, match="scales rotary positions"):
        pliant.load(path)


def test_divisors_of_one_change_nothing(tmp_path, recwarn):
    path = pliant.export(model_with(), tmp_path / "a.gguf", to="gguf", type="f32")
    loaded = pliant.load(copied(path, tmp_path / "b.gguf", divisors=np.ones(16)))
    assert loaded.config.rope_parameters["rope_type"] == "default"
    assert not [entry for entry in recwarn if "rotary" in str(entry.message)]
