"""Folders of other tools load correctly, or are refused with an error that names their kind and the alternative."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pliant
from pico import logits, pico, tokenizer
from pliant.errors import ArtefactError

OID = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize 1\n"
WEIGHTS = "model.safetensors"


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def config(folder, **keys):
    path = folder / "config.json"
    known = {**json.loads(path.read_text()), **keys}
    write(path, {key: value for key, value in known.items() if value is not ...})


def only(folder, *names):
    """Leave nothing but these."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def as_bin(folder, shards=1):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-0000{number % shards + 1}-of-0000{shards}.bin" for number, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, folder / file)
    write(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": files})


def adapter(folder):
    only(folder)
    write(folder / "adapter_config.json", {"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "peft_type": "LORA"})
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def diffusers(folder):
    only(folder)
    write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    for part in ("text_encoder", "unet"):
        write(folder / part / "config.json", {"model_type": "clip_text_model"})


def part_of_diffusers(folder):
    write(folder / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 64})


def hub_cache(folder):
    only(folder)
    write(folder / "snapshots" / "0123abc" / "config.json", {"model_type": "llama"})
    write(folder / "refs" / "main", "0123abc")


def codes_without_a_config(folder):
    state = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, folder / WEIGHTS, {"format": "pt"})


def without_shard(folder):
    as_bin(folder, 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def lfs_shards(folder):
    pico().save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink()
    write(max(folder.glob("model-*")), LFS)


REFUSED = {
    "an adapter": (adapter, r"is a peft adapter of 'meta-llama/Llama-3.2-1B', not a model; load both with peft"),
    "an adapter with a config": (
        lambda f: [adapter(f), write(f / "config.json", {"model_type": "llama"})],
        r"has no model.safetensors, but a peft adapter of 'meta-llama/Llama-3.2-1B'",
    ),
    "an adapter of nothing": (
        lambda f: [only(f), write(f / "adapter_config.json", "{")],
        "a peft adapter of 'a model that it does not name'",
    ),
    "a diffusers pipeline": (diffusers, "is a diffusers pipeline; give a sub-folder with .*: text_encoder, unet"),
    "a part of diffusers": (part_of_diffusers, r"part of a diffusers pipeline \(UNet2DConditionModel\)"),
    "GGUF files": (
        lambda f: [only(f), write(f / "a.Q4.gguf"), write(f / "b.Q8.gguf")],
        "has no config.json, but GGUF files; give one of them: a.Q4.gguf, b.Q8.gguf",
    ),
    "a GGUF file beside a config": (
        lambda f: [only(f, "config.json"), write(f / "a.gguf")],
        "has no model.safetensors, but GGUF files; give one of them: a.gguf",
    ),
    "an ONNX model": (
        lambda f: [only(f), write(f / "onnx" / "model.onnx")],
        "an ONNX model; give the model it was made from: onnx/model.onnx",
    ),
    "an ONNX model with a config": (
        lambda f: [only(f, "config.json"), write(f / "model.onnx")],
        "has no model.safetensors; transformers cannot load model.onnx under these names",
    ),
    "weights of TensorFlow": (
        lambda f: [only(f, "config.json"), write(f / "tf_model.h5")],
        "has no model.safetensors; transformers cannot load tf_model.h5",
    ),
    "a variant": (
        lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"),
        "has no model.safetensors; transformers cannot load model.fp16.safetensors .*; pass variant='fp16'",
    ),
    "checkpoints of a training": (
        lambda f: [only(f), write(f / "checkpoint-500" / "config.json", "{}")],
        "but its sub-folders do; give one of them: checkpoint-500",
    ),
    "a folder of a hub's cache": (hub_cache, "give one of them: snapshots/0123abc"),
    "an empty folder": (only, "has no config.json: it is not a model folder"),
    "an empty file": (lambda f: write(f / WEIGHTS), "model.safetensors' is empty"),
    "a pointer of git-lfs": (lambda f: write(f / WEIGHTS, LFS), "is a git-lfs pointer, .* run 'git lfs pull' in"),
    "shards that are pointers": (lfs_shards, r"model-\d+-of-\d+.safetensors' is a git-lfs pointer"),
    "a bin that is a pointer": (
        lambda f: [only(f, "config.json"), write(f / "pytorch_model.bin", LFS)],
        "is a git-lfs pointer",
    ),
    "a config that is a pointer": (lambda f: write(f / "config.json", LFS), "config.json' is a git-lfs pointer"),
    "a bin that is damaged": (
        lambda f: [only(f, "config.json"), write(f / "pytorch_model.bin", "nothing of the kind")],
        "cannot load",
    ),
    "a bin without a shard": (without_shard, "the shard .*pytorch_model-00002-of-00002.bin' is missing"),
    "an index that is none": (
        lambda f: [(f / WEIGHTS).unlink(), write(f / f"{WEIGHTS}.index.json", {"weight_map": [1]})],
        "is not the index of a sharded model",
    ),
    "no model_type": (lambda f: config(f, model_type=...), "names no model_type; transformers needs one"),
    "a list for a config": (lambda f: write(f / "config.json", "[]"), "names no model_type"),
    "an unknown model_type": (
        lambda f: config(f, model_type="llama9"),
        "model type `llama9` but Transformers does not recognize this architecture",
    ),
    "a config of words": (lambda f: config(f, hidden_size="large"), "cannot load .*hidden_size"),
    "a config of zeros": (lambda f: config(f, num_attention_heads=0), "cannot load"),
    "a config of another size": (
        lambda f: config(f, intermediate_size=64),
        r"'model.layers.0.mlp.down_proj.weight' has shape \(36, 48\) in .*, .* describes shape \(36, 64\); "
        "config and weights",
    ),
    "the tokens of another model": (lambda f: config(f, vocab_size=100), r"has shape \(300, 36\)"),
    "codes that nothing explains": (codes_without_a_config, "holds 8-bit codes .* they would be noise"),
    "code of its own": (
        lambda f: config(f, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        r"runs custom code \(modeling_mine.Mine\); read that code, .* trust_remote_code=True",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_foreign_folder_is_refused_with_what_it_is(kind, folder):
    change, said = REFUSED[kind]
    change(folder)
    with pytest.raises(ArtefactError, match=said):
        pliant.load(folder)


def large_index(folder):
    """An index of other shards beside a whole file, which comes first."""
    write(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": {"model.norm.weight": "gone.safetensors"}})


def sentence_transformers(folder):
    write(folder / "modules.json", [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "Pooling"}])
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})


LOADED = {
    "a bin": as_bin,
    "a bin in shards": lambda f: as_bin(f, 2),
    "a stale index": large_index,
    "no architectures": lambda f: config(f, architectures=None),
    "architectures that nobody knows": lambda f: config(f, architectures=["LLaMAForCausalLM"]),
    "no dtype": lambda f: config(f, dtype=None, torch_dtype=None),
    "sub-folders of sentence-transformers": sentence_transformers,
    "an ONNX model beside it": lambda f: write(f / "onnx" / "model.onnx"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_a_foreign_folder_loads(kind, folder, model):
    expected = logits(model)
    LOADED[kind](folder)
    assert torch.equal(logits(pliant.load(folder)), expected)


def test_a_folder_may_be_named_in_any_way(folder, model, monkeypatch):
    home = folder.parent
    shutil.copytree(folder, home / "a folder with spaces, and ümläute")
    (home / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    names = [f"{folder}/", f"~/{folder.name}", folder.name, f"./{folder.name}", f"{folder}/../{folder.name}"]
    names += ["link", home / "a folder with spaces, and ümläute"]
    for name in names:
        loaded = pliant.load(name)
        assert torch.equal(logits(loaded), logits(model)), name
        assert pliant.evaluate(loaded, perplexity=pliant.text(["a small river " * 20]), seqlen=32)["perplexity"]


def test_a_folder_that_cannot_be_written_is_read(folder, model, tmp_path):
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    pliant.save(pliant.load(folder), tmp_path / "out")
    assert os.access(tmp_path / "out" / WEIGHTS, os.R_OK)
    (tmp_path / "out" / "tokenizer.json").unlink()  # copies belong to the result, not to what they were copied from
    assert torch.equal(logits(pliant.load(tmp_path / "out")), logits(model))


def test_a_variant_and_a_sub_folder_are_found(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "outer" / "inner", variant="fp16", max_shard_size="30KB")
    loaded = pliant.load(tmp_path / "outer", subfolder="inner", variant="fp16")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ArtefactError, match=r"no model\.bf16\.safetensors"):
        pliant.load(folder, variant="bf16")


BASES = {  # what a config names in architectures, and the class that is to be loaded
    "bert": ("BertModel", "BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"),
    "roberta": ("RobertaForMaskedLM", "RobertaModel"),
    "vit": ("ViTModel", "ViTForImageClassification"),
    "llama": ("LlamaModel", "LlamaForSequenceClassification", "LlamaForCausalLM"),
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in BASES.items() for name in names])
def test_the_class_that_a_config_names_is_loaded(family, name, tmp_path):
    torch.manual_seed(0)
    made = getattr(transformers, name)(pico(family).config).eval()
    made.save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path)
    assert type(loaded) is type(made)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in made.state_dict().items())


def test_the_tokenizer_is_that_of_the_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    loaded = pliant.load(f"~/{folder.name}")
    assert pliant.checkpoint.load.tokenizer_of(loaded)("a b")["input_ids"] == tokenizer()("a b")["input_ids"]
