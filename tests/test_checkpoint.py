"""What is written reloads with plain transformers, and fails loudly where it cannot."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers

import convnets
import pico as tiny
import pliant
from pico import ARCHITECTURES, cases, fitted, head_of, inputs, leader, pico, tokenizer
from pliant.anatomy import anatomy_of, layers_of
from pliant.checkpoint.fingerprint import check_finite, fingerprint
from pliant.checkpoint.load import tokenizer_of
from pliant.checkpoint.per_layer_config import write
from pliant.elastic import Subnet, extract
from pliant.errors import ArtefactError, WeightError
from pliant.exporters.homogeneous import homogeneous

IDS = torch.tensor([[5, 17, 101, 3, 77, 250, 9, 41, 12]])
CUTS = {
    "one attention": lambda _: Subnet().without("layers.0.attention"),
    "one MLP": lambda _: Subnet().without("layers.2.mlp"),
    "a layer": lambda _: Subnet().without("layers.3.attention").without("layers.3.mlp"),
    "channels": lambda _: Subnet().keeping("layers.1.mlp.channels", 17),
    "heads": lambda head: Subnet().keeping(f"layers.1.attention.{head}", 1),
    "experts": lambda _: Subnet().keeping("layers.1.mlp.experts", 2),
    "heads, and a layer": lambda head: (
        Subnet().keeping(f"layers.1.attention.{head}", 1).without("layers.3.attention", "layers.3.mlp")
    ),
    "heads, and an MLP": lambda head: Subnet().keeping(f"layers.1.attention.{head}", 1).without("layers.2.mlp"),
    "all of it": lambda head: (
        Subnet()
        .without("layers.0.attention")
        .without("layers.2.mlp")
        .keeping("layers.1.mlp.channels", 9)
        .keeping(f"layers.1.attention.{head}", 1)
    ),
}


def cut(name, kind):
    model = pico(name)
    anatomy = anatomy_of(model)
    extract(model, anatomy, fitted(CUTS[kind](leader(name)), anatomy))
    write(model)
    return model


def logits(model):
    return tiny.logits(model.eval(), IDS)


def in_a_process_without_pliant(code):
    """Run code where pliant cannot be imported; returns the completed process."""
    program = "import sys; sys.modules['pliant'] = None\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def _refused(folder, kind, text):
    """Whether transformers alone refused a folder, and for what was cut: a key or a tensor that the cut has changed."""
    config = json.loads((folder / "config.json").read_text())
    keys = {key for entry in config["per_layer_config"].values() for key in entry if key != "skip"}
    if config.get("allow_global_per_layer_attribute_access"):
        return kind == "RuntimeError" and "ignore_mismatched_sizes" in text
    return kind == "AmbiguousGlobalPerLayerAttributeError" and text.split("'")[1] in keys


def test_transformers_alone_refuses_every_cut_model(tmp_path):
    """Random weights in place of what was removed would be the worst outcome of all."""
    for name, kind in cases(CUTS):
        cut(name, kind).save_pretrained(tmp_path / f"{head_of(name).__name__} {name} {kind}")
    for name in ("llama", "gpt_neox"):  # what let the narrower attention load must not let the removed one
        model = cut(name, "heads")
        extract(model, anatomy_of(model), Subnet().without("layers.1.attention"))
        write(model)
        model.save_pretrained(tmp_path / f"{head_of(name).__name__} {name} heads, then all of the attention")
    outcome = in_a_process_without_pliant(f"""
        import json, pathlib, transformers
        transformers.logging.set_verbosity_error()
        for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
            try:
                getattr(transformers, folder.name.split()[0]).from_pretrained(folder)
            except Exception as error:
                print(json.dumps([folder.name, type(error).__name__, str(error)]))
            else:
                print(json.dumps([folder.name, "LOADED", ""]))
    """)
    told = {name: (kind, text) for name, kind, text in map(json.loads, outcome.stdout.splitlines())}
    assert len(told) == len(cases(CUTS)) + 2, outcome.stderr
    built = {name for name, refusal in told.items() if not _refused(tmp_path / name, *refusal)}
    assert built == set()
    by_sizes = {name.split()[1] for name, (kind, _) in told.items() if kind == "RuntimeError"}
    # where heads or experts differ, the config has to let the global value be read, and only the sizes of tensors
    # refuse
    assert by_sizes == {name for name, kind in cases(CUTS) if kind in ("heads", "experts")}


@pytest.mark.slow
def test_pliant_may_be_imported_after_transformers_has_loaded_the_family(tmp_path):
    model = cut("llama", "all of it")
    model.save_pretrained(tmp_path / "cut")
    program = textwrap.dedent(f"""
        import torch, transformers
        from transformers import AutoModelForCausalLM, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
        import pliant
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "cut")!r})
        assert type(model.model.layers[0]) is LlamaDecoderLayer
        print(model(torch.tensor({IDS.tolist()}), use_cache=False).logits.sum().item())
    """)
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(outcome.stdout) == pytest.approx(logits(model).sum().item(), abs=1e-3)


def test_importing_pliant_imports_neither_torch_nor_transformers():
    code = "import sys, pliant; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wrapped_constructor_is_needed_by_this_transformers(tmp_path):
    """When transformers builds such models itself, pliant.compat.layers has to step aside: this test tells."""
    cut("llama", "channels").save_pretrained(tmp_path / "cut")
    outcome = in_a_process_without_pliant(f"""
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({str(tmp_path / "cut")!r})
    """)
    assert outcome.returncode != 0, f"transformers {transformers.__version__} reads per_layer_config by itself"
    assert "per-layer attribute" in outcome.stderr


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saving_a_reloaded_model_again_writes_the_same_config(name, tmp_path):
    cut(name, "all of it").save_pretrained(tmp_path / "once")
    head_of(name).from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reloaded_model_can_be_cut_further(name, tmp_path):
    cut(name, "all of it").save_pretrained(tmp_path / "once")
    model = head_of(name).from_pretrained(tmp_path / "once")
    before = anatomy_of(model)
    further = Subnet().keeping("layers.1.mlp.channels", 4).keeping("layers.1.mlp.experts", 3).without("layers.3.mlp")
    left = extract(model, before, fitted(further, before))
    write(model)
    model.save_pretrained(tmp_path / "twice")
    again = head_of(name).from_pretrained(tmp_path / "twice")
    assert torch.allclose(logits(again), logits(model), atol=5e-6)
    assert set(anatomy_of(again).blocks) == set(left.blocks)


def test_the_config_speaks_the_vocabulary_of_transformers(tmp_path):
    cut("llama", "all of it").save_pretrained(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"rms_norm_eps": 1.0000000000000002e-06, "skip": ["attention"]},
        "1": {"intermediate_size": 9, "num_attention_heads": 2, "num_key_value_heads": 1},
        "2": {"rms_norm_eps": 1.0000000000000002e-06, "skip": ["mlp"]},
    }
    assert config["pliant_dense_layers"] == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_attention_choice_work_on_a_reloaded_model(name, tmp_path):
    model = cut(name, "all of it")
    model.save_pretrained(tmp_path / "cut")
    again = head_of(name).from_pretrained(tmp_path / "cut")
    assert len(again(**inputs(again, IDS), output_hidden_states=True).hidden_states) == 5
    again.set_attn_implementation("eager")
    layers = layers_of(again, anatomy_of(again).architecture)
    read = [module.config for module in layers.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in read} <= {again.config._attn_implementation}
    assert torch.allclose(logits(again), logits(model), atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_model_loads_without_its_head_too(name, tmp_path):
    model = cut(name, "all of it").eval()
    model.save_pretrained(tmp_path / "cut")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "cut").eval()
    with torch.inference_mode():
        expected, found = (m(**inputs(model, IDS))[0] for m in (model.base_model, bare))
    assert torch.allclose(found, expected, atol=5e-6)


def test_a_sharded_model_reloads(tmp_path):
    model = cut("llama", "all of it")
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert torch.allclose(logits(pliant.load(tmp_path / "cut")), logits(model), atol=5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_kept(dtype, tmp_path):
    model = cut("llama", "channels").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "cut")
    assert pliant.load(tmp_path / "cut").dtype == getattr(torch, dtype)


def test_gradients_and_peft_like_replacement_work_on_a_cut_model():
    model = cut("llama", "all of it").train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# --- damaged and missing folders
# ---------------------------------------------------------------------------------------


def damaged(folder, change):
    change(folder)
    with pytest.raises(ArtefactError) as refusal:
        pliant.load(folder)
    return str(refusal.value)


def test_a_truncated_file_is_refused(folder):
    weights = folder / "model.safetensors"
    told = damaged(folder, lambda _: weights.write_bytes(weights.read_bytes()[:-100]))
    assert "truncated" in told
    assert "model.safetensors" in told


def test_a_file_without_a_header_is_refused(folder):
    assert "header" in damaged(folder, lambda f: (f / "model.safetensors").write_bytes(b"nothing of the kind"))


def test_a_missing_shard_is_refused(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    assert shard.name in damaged(folder, lambda _: shard.unlink())


def test_a_folder_that_is_no_model_is_refused(folder, tmp_path):
    assert "no config.json" in damaged(tmp_path, lambda _: None)
    assert "no model.safetensors" in damaged(folder, lambda f: (f / "model.safetensors").unlink())
    assert "not JSON" in damaged(folder, lambda f: (f / "config.json").write_text("{"))


def test_a_path_that_is_not_there_is_refused_without_asking_a_hub(tmp_path):
    with pytest.raises(ArtefactError, match="is not a model folder"):
        pliant.load(tmp_path / "gone")
    with pytest.raises(ArtefactError, match="does not exist; give a folder"):
        pliant.load(tmp_path / "gone.gguf")


def test_the_tokenizer_of_a_gguf_file_is_in_it(monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *given, **options: asked.append((given, options))
    )
    model = pico()
    model.name_or_path = "/models/some.Q4_1.gguf"
    tokenizer_of(model)
    assert asked == [(("/models",), {"gguf_file": "some.Q4_1.gguf"})]


def test_weights_that_would_be_random_are_refused(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    told = damaged(folder, lambda f: save_file(tensors, f / "model.safetensors", metadata={"format": "pt"}))
    assert "model.layers.1.mlp.up_proj.weight" in told


def test_torch_dtype_is_taken_with_a_warning(folder):
    with pytest.warns(FutureWarning, match="dtype"):
        assert pliant.load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_values_that_are_not_finite_are_found(model):
    check_finite(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.2\.mlp\.up_proj\.weight holds 1 value"):
        check_finite(model)


def test_a_fingerprint_tells_models_apart():
    assert fingerprint(pico("llama")) == fingerprint(pico("llama"))
    assert fingerprint(pico("llama")) != fingerprint(pico("llama", seed=1))
    assert fingerprint(pico("llama")) != fingerprint(cut("llama", "channels"))


# --- homogeneous export
# ------------------------------------------------------------------------------------------------


def without_layers(name, *layers):
    model = pico(name)
    subnet = Subnet()
    for layer in layers:
        subnet = subnet.without(f"layers.{layer}.attention").without(f"layers.{layer}.mlp")
    extract(model, anatomy_of(model), subnet)
    write(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_layers_are_dropped_and_the_rest_renumbered(name):
    model = without_layers(name, 0, 3)  # where attention types take turns, one of each stays
    dense = pico(name)
    plain = homogeneous(model)
    assert plain.config.num_hidden_layers == 2
    assert not torch.allclose(logits(plain), logits(dense), atol=1e-3)
    assert torch.allclose(logits(plain), logits(model), atol=5e-6)


@pytest.mark.slow
def test_transformers_alone_loads_what_is_left_of_a_model_without_some_of_its_layers(tmp_path):
    for name in ARCHITECTURES:
        plain = homogeneous(without_layers(name, 0, 3))
        plain.save_pretrained(tmp_path / name)
        expected = {"head": head_of(name).__name__, "inputs": inputs(plain, IDS), "logits": logits(plain)}
        torch.save(expected, tmp_path / name / "expected.pt")
    outcome = in_a_process_without_pliant(f"""
        import pathlib, torch, transformers
        for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
            expected = torch.load(folder / "expected.pt")
            head = getattr(transformers, expected["head"])
            model, told = head.from_pretrained(folder, output_loading_info=True)
            assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
            with torch.no_grad():
                found = model.eval()(**expected["inputs"]).logits
            print(folder.name, len(found), (found - expected["logits"]).abs().max().item())
    """)
    assert outcome.returncode == 0, outcome.stderr
    told = [line.split() for line in outcome.stdout.splitlines()]
    assert [name for name, _, _ in told] == sorted(ARCHITECTURES)
    assert all(float(difference) < 5e-6 for _, _, difference in told)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_one_width_for_all_layers_goes_into_the_ordinary_keys(name):
    model = pico(name)
    subnet = Subnet()
    for layer in range(4):
        subnet = subnet.keeping(f"layers.{layer}.mlp.channels", 20).keeping(f"layers.{layer}.attention.kv", 2)
    extract(model, anatomy_of(model), subnet)
    write(model)
    plain = homogeneous(model)
    assert plain.config.intermediate_size == 20
    assert (plain.config.num_key_value_heads, plain.config.num_attention_heads) == (2, 4)
    assert torch.allclose(logits(plain), logits(model), atol=5e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_one_number_of_experts_for_all_layers_goes_into_the_ordinary_keys(name):
    model = pico(name)
    subnet = Subnet()
    for layer in range(4):
        subnet = subnet.keeping(f"layers.{layer}.mlp.channels", 8).keeping(f"layers.{layer}.mlp.experts", 3)
    extract(model, anatomy_of(model), subnet)
    write(model)
    plain = homogeneous(model)
    assert (plain.model.layers[2].mlp.gate.num_experts, plain.num_experts) == (3, 3)
    assert not hasattr(plain.config, "_heterogeneity_spec")
    assert torch.allclose(logits(plain), logits(model), atol=5e-6)


def test_what_an_ordinary_config_cannot_say_is_refused():
    with pytest.raises(ArtefactError, match="layers 0 have lost one block"):
        homogeneous(cut("llama", "one attention"))
    with pytest.raises(ArtefactError, match="intermediate_size differs"):
        homogeneous(cut("llama", "channels"))
    with pytest.raises(ArtefactError, match="has no list of layers that could be shortened"):
        homogeneous(convnets.net("resnet_basic"))
    with pytest.raises(ArtefactError, match="this model is packed"):
        homogeneous(pliant.apply(pico("llama"), pliant.PackedLinear(), progress=False))


def test_layers_that_compute_by_their_number_are_not_renumbered():
    model = pico("gpt2", scale_attn_by_inverse_layer_idx=True)
    subnet = Subnet().without(*(f"layers.{layer}.{kind}" for layer in (0, 1) for kind in ("attention", "mlp")))
    extract(model, anatomy_of(model), subnet)
    with pytest.raises(ArtefactError, match="when its layers are renumbered"):
        homogeneous(model)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "stablelm", "opt", "bert", "distilbert"])
def test_heads_that_an_ordinary_config_cannot_count_are_refused(name):
    model = pico(name)
    subnet = Subnet()
    for layer in range(4):
        axis = f"layers.{layer}.attention.{leader(name)}"
        subnet = subnet.keeping(axis, anatomy_of(model).axes[axis].size - 1)
    extract(model, anatomy_of(model), subnet)
    with pytest.raises(ArtefactError, match=r"has no key for the (number|size) of"):
        homogeneous(model)


def test_the_tokenizer_of_the_tests_is_what_it_says():
    assert max(tokenizer()("the quick brown fox")["input_ids"]) < 300
