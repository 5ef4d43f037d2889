"""Models other than plain causal language models load, and are measured or refused correctly."""

import pytest
import torch
import transformers

import pliant
from pico import VOCABULARY, pico
from pliant.errors import ArchitectureError
from pliant.forward.windows import predicts

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 8}
TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
SEES = {  # family -> settings of its config
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 299,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 299,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 14},
        "image_token_id": 298,
        "video_token_id": 297,
    },
}
PAIRED = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
PAIRED |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
WRITES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": PAIRED,
    "whisper": {**PAIRED, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
}
PROSE = pliant.text(["a small river runs past the old mill and turns its wheel " * 4])


def made(name, **settings):
    """A model of random weights with the head that checkpoints of its family have."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    )
    name = type(config).__name__.removesuffix("Config") + "ForConditionalGeneration"
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("family", SEES)
def test_a_vision_language_model_loads_and_is_measured(family, tokenizer, tmp_path):
    model = made(family, **SEES[family])
    model.save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert predicts(loaded)
    found = pliant.evaluate(loaded, perplexity=PROSE, tokenizer=tokenizer, seqlen=32)["perplexity"]["a list"]
    ids = PROSE.windows(tokenizer, 32)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("family", SEES)
def test_a_vision_language_model_is_saved_with_its_processor(family, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    made(family, **SEES[family]).save_pretrained(source)
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (source / name).write_text("{}")
    model = pliant.load(source)
    pliant.save(model, out)
    assert {"processor_config.json", "preprocessor_config.json"} <= {path.name for path in out.iterdir()}
    again = pliant.load(out).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
    card = (out / "README.md").read_text()
    assert (
        type(model).__name__
        in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    )
    assert (
        f"from transformers import {'AutoModelForCausalLM' if family == 'gemma3' else 'AutoModelForImageTextToText'}"
        in card
    )


@pytest.mark.parametrize("family", WRITES)
def test_an_encoder_decoder_model_loads_and_is_not_measured(family, tokenizer, prose, tmp_path):
    model = made(family, **WRITES[family])
    model.save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert not predicts(loaded)
    with pytest.raises(ArchitectureError, match=r"is an encoder-decoder model; .* needs a causal language model"):
        pliant.evaluate(loaded, perplexity=PROSE, tokenizer=tokenizer)
    before = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    with pytest.raises(ArchitectureError):
        pliant.apply(loaded, pliant.BlockPruner(ratio=0.1), prose, tokenizer=tokenizer, progress=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in loaded.state_dict().items())
    pliant.save(loaded, tmp_path / "out", tokenizer=tokenizer)
    again = pliant.load(tmp_path / "out").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_sees_all_tokens_is_not_measured(family, tokenizer):
    config = pico(family).config
    auto = transformers.AutoModelForCausalLM.from_config(
        config
    ).eval()  # has a head that predicts tokens, and sees them
    assert not predicts(auto)
    with pytest.raises(ArchitectureError, match="predicts no next tokens"):
        pliant.evaluate(auto, perplexity=PROSE, tokenizer=tokenizer)
