"""config.json of a cut model, as read by pliant, by current transformers, and by a transformers that builds it
alone."""

import copy
import inspect
import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
import yaml
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

import pliant
from pico import ARCHITECTURES, IDS, config, fitted, head_of, inputs, logits, pico
from pliant.anatomy import DENSE_LAYERS, anatomy_of, entries_of, layers_of, plain_config
from pliant.checkpoint.per_layer_config import as_transformers_alone, write
from pliant.elastic import Subnet, described, extract
from pliant.errors import ArchitectureError, ArtefactError, UnknownArchitectureError

WITHOUT_EPSILON = ("opt", "distilbert")
MIXTURE = Subnet().without("layers.0.attention").without("layers.2.mlp").keeping("layers.1.mlp.channels", 9)


def cut(model, subnet):
    extract(model, anatomy_of(model), subnet)
    write(model)
    return model


def reloaded(model, folder, **options):
    """What transformers makes of a saved model, every weight of it read from the folder."""
    model.save_pretrained(folder)
    again, told = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again.eval()


def without_pliant(code):
    """The lines that a program prints where pliant cannot be imported."""
    program = "import sys; sys.modules['pliant'] = None\n" + textwrap.dedent(code)
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.splitlines()


# --- guards
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_guard_is_the_next_float_of_the_norm_epsilon_and_a_layer_can_be_built_from_it(name):
    model = cut(pico(name), Subnet().without("layers.0.attention").without("layers.3.attention", "layers.3.mlp"))
    plain, layers = plain_config(model.config), layers_of(model, anatomy_of(model).architecture)
    for index in (0, 3):
        entry = entries_of(model.config)[index]
        skipped = entry.pop("skip")
        if name in WITHOUT_EPSILON:
            assert set(entry.values()) == {0}
            continue
        ((key, value),) = entry.items()
        assert value == math.nextafter(getattr(plain, key), math.inf) > getattr(plain, key) > 0
        arguments = (model.config.per_layer_config[index], index)
        takes = len(inspect.signature(type(layers[index]).__init__).parameters) - 1
        built = type(layers[index])(*arguments[:takes])  # as transformers would build it that reads these entries
        assert sum(parameter.numel() for parameter in built.parameters()) > 0
        assert skipped == (["attention"] if index == 0 else ["attention", "mlp"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_where_only_blocks_are_gone_nobody_is_let_read_the_global_value(name):
    model = pico(name)
    model.config.allow_global_per_layer_attribute_access = True
    cut(model, Subnet().without("layers.1.attention", "layers.1.mlp"))
    assert not model.config.allow_global_per_layer_attribute_access
    token = as_transformers_alone.set(True)
    try:
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError), torch.device("meta"):
            type(model)(model.config)
    finally:
        as_transformers_alone.reset(token)


def _carrying(name, **mlp):
    """A model that carries its architecture, with other words about its MLP."""
    model = pico(name)
    raw = copy.deepcopy(dict(anatomy_of(model).architecture.raw))
    raw["blocks"]["mlp"] |= mlp
    model.config.pliant_architecture = raw
    return model


@pytest.mark.parametrize(
    ("key", "value"),
    [("pad_token_id", 0), ("hidden_act", "silu"), ("attention_bias", False), ("head_count", None), ("none", math.inf)],
)
def test_a_guard_whose_other_value_nobody_would_notice_is_refused_before_anything_is_cut(key, value):
    model = _carrying("llama", guard=key)
    if value is not None:
        setattr(model.config, key, value)
    with pytest.raises(ArchitectureError, match=f"the guard '{key}', which is {value!r}"):
        anatomy_of(model)


def test_a_guard_that_transformers_does_not_read_is_found_when_it_is_written():
    model = _carrying("llama", guard="attention_dropout")  # 0.0: the next float is another value, and a layer reads it
    cut(model, Subnet().without("layers.1.mlp"))
    assert entries_of(model.config)[1]["attention_dropout"] == math.nextafter(0, 1)
    model = _carrying("llama", guard="initializer_range")
    with pytest.raises(
        ArchitectureError, match=r"does not read initializer_range\. Name another 'guard' in llama\.yaml"
    ):
        cut(model, Subnet().without("layers.1.mlp"))


def test_a_block_with_nothing_to_guard_it_is_refused():
    model = _carrying("opt")
    model.config.pliant_architecture["axes"]["channels"] = {"size": "1 * ffn_dim", "cut": False}
    with pytest.raises(ArchitectureError, match=r"block 'mlp' of opt\.yaml needs 'guard'"):
        anatomy_of(model)


# --- folders written before
# ----------------------------------------------------------------------------------------------

BEFORE = {
    "llama": {
        "0": {"num_key_value_heads": 0, "skip": ["attention"]},
        "1": {"intermediate_size": 9},
        "2": {"intermediate_size": 0, "skip": ["mlp"]},
    },
    "gpt2": {
        "0": {"n_head": 0, "skip": ["attention"]},
        "1": {"n_inner": 9},
        "2": {"n_inner": 0, "skip": ["mlp"]},
    },
    "falcon": {
        "0": {"layer_norm_epsilon": 0.0, "skip": ["attention"]},
        "1": {"ffn_hidden_size": 9},
        "2": {"ffn_hidden_size": 0, "skip": ["mlp"]},
    },
    "bert": {
        "0": {"num_attention_heads": 0, "skip": ["attention"]},
        "1": {"intermediate_size": 9},
        "2": {"intermediate_size": 0, "skip": ["mlp"]},
    },
    "mixtral": {
        "0": {"num_key_value_heads": 0, "skip": ["attention"]},
        "1": {"intermediate_size": 8},
        "2": {"intermediate_size": 0, "skip": ["mlp"]},
    },
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_folder_that_was_written_with_zeros_as_guards_and_no_mark_loads_and_is_written_anew(name, tmp_path):
    model = pico(name)
    cut(model, fitted(MIXTURE, anatomy_of(model))).save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    written = json.loads(file.read_text())
    now = written["per_layer_config"]
    assert written.pop(DENSE_LAYERS) == {}
    file.write_text(json.dumps(written | {"per_layer_config": BEFORE[name]}))
    again, told = head_of(name).from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(logits(again.eval()), logits(model), atol=5e-6)
    write(again)
    assert entries_of(again.config) == {int(layer): entry for layer, entry in now.items()}


# --- per-layer parts that are not pliant's
# -------------------------------------------------------------------------------

_TINY = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_TINY |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
_GEMMA4 = _TINY | {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 6,
}
_GEMMA4 |= {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
OWN = {  # families that transformers builds from a per-layer part of their own: what of their defaults has to be set
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {},
    "embedding_gemma2": {},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots3_note": {},
    "step3p7": {},
    "neomme": {},
}
HERE = [
    name
    for name, given in OWN.items()
    if name in transformers.CONFIG_MAPPING
    and any(
        part.is_heterogeneous
        for whole in [transformers.AutoConfig.for_model(name, **copy.deepcopy(given))]
        for part in (whole, whole.get_text_config())
    )
]


@pytest.mark.parametrize("name", HERE)
def test_a_family_with_a_per_layer_part_of_its_own_is_built_as_without_pliant(name):
    def built(alone):
        token = as_transformers_alone.set(alone)
        try:
            with torch.device("meta"):
                made = transformers.AutoConfig.for_model(name, **copy.deepcopy(OWN[name]))
                return transformers.AutoModel.from_config(made)
        finally:
            as_transformers_alone.reset(token)

    one, other = built(alone=True), built(alone=False)
    assert {key: tensor.shape for key, tensor in one.state_dict().items()} == {
        key: tensor.shape for key, tensor in other.state_dict().items()
    }
    assert other.config.to_dict() == one.config.to_dict()


@pytest.mark.skipif(not HERE, reason="this transformers has no such family")
def test_a_family_with_a_per_layer_part_of_its_own_loads_after_import_pliant_as_before(tmp_path):
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model("gemma4_text", **copy.deepcopy(_GEMMA4))
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    assert torch.equal(logits(reloaded(model, tmp_path / "dense")), logits(model))
    assert "pliant_dense_layers" not in (tmp_path / "dense" / "config.json").read_text()
    with pytest.raises(ArchitectureError, match="gemma4_text"):
        described(model)


GEMMA4 = """
models: [gemma4_text]
layers: model.layers
fixed: {hidden: hidden_size}
axes:
  heads:    {size: num_attention_heads, unit: head_dim, cut: false}
  channels: {size: intermediate_size}
blocks:
  attention:
    module: self_attn
    norms: [input_layernorm, post_attention_layernorm]
    output: tuple
    slot: layer_idx
    scores: heads
    weights:
      q_proj: [heads, hidden]
      k_proj?: whole
      v_proj?: whole
      o_proj: [hidden, heads]
      q_norm: whole
      k_norm?: whole
  mlp:
    module: mlp
    norms: [pre_feedforward_layernorm, post_feedforward_layernorm]
    weights: {gate_proj: [channels, hidden], up_proj: [channels, hidden], down_proj: [hidden, channels]}
"""


@pytest.mark.skipif(not HERE, reason="this transformers has no such family")
def test_entries_that_the_dense_model_has_are_merged_with_what_was_cut_and_come_back(tmp_path):
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model("gemma4_text", **copy.deepcopy(_GEMMA4))
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    own = entries_of(model.config)
    assert own == {layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in (1, 3)}
    model.config.pliant_architecture = yaml.safe_load(GEMMA4)
    cut(model, MIXTURE)
    guard = {"rms_norm_eps": math.nextafter(1e-6, 1)}
    merged = {
        0: {"skip": ["attention"], **guard},
        1: {**own[1], "intermediate_size": 9},
        2: {"skip": ["mlp"], **guard},
        3: own[3],
    }
    assert entries_of(model.config) == merged
    again = reloaded(model, tmp_path / "once")
    assert torch.equal(logits(again), logits(model))
    assert entries_of(plain_config(again.config)) == own
    asked = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, whole = (again.generate(IDS, use_cache=use, **asked) for use in (True, False))
    assert cached.equal(whole)
    cut(again, Subnet().without("layers.3.mlp"))  # and further
    assert entries_of(again.config) == merged | {3: {**own[3], "skip": ["mlp"], **guard}}
    assert torch.equal(logits(reloaded(again, tmp_path / "twice")), logits(again))
    (told,) = without_pliant(f"""
        import transformers
        try:
            transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "once")!r})
        except Exception as error:
            print(type(error).__name__, str(error).split("'")[1])
    """)
    assert told == "AmbiguousGlobalPerLayerAttributeError rms_norm_eps"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"sliding_window": 4}, "sets 'sliding_window' of layer 1, which has no effect"),
        ({"intermediate_size": 9, "rope_theta": 5.0}, "sets 'rope_theta' of layer 1"),
        ({"skip": ["self_attn"], "num_key_value_heads": 0}, "skips 'self_attn' in layer 1; .* blocks attention, mlp"),
        ({"intermediate_size": 49}, "gives layers.1.mlp 49 channels; the dense model has 48"),
        ({"intermediate_size": 0}, "gives layers.1.mlp 0 channels"),
    ],
)
def test_what_is_not_known_of_a_layer_is_refused(entry, told):
    made = config("llama")
    made.sliding_window, made.rope_theta = None, 1.0
    made.per_layer_config = {1: entry}
    with pytest.raises(ArtefactError, match=told):
        transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("value", [0.1, 0.0, math.nextafter(1e-6, 1), True])
@pytest.mark.parametrize("skip", [{}, {"skip": []}, {"skip": ["mlp"]}], ids=["none", "empty", "mlp"])
def test_an_epsilon_of_a_layer_is_refused_unless_it_guards_a_removed_block(value, skip, tmp_path):
    model = pico("llama")
    model.config.per_layer_config = {1: skip | {"rms_norm_eps": value}}
    if skip.get("skip") and value is not True and value in (0.0, math.nextafter(1e-6, 1)):
        transformers.AutoModelForCausalLM.from_config(model.config)
        return
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"sets 'rms_norm_eps' of layer 1 to .*, which has no effect"):
        pliant.load(tmp_path)


@pytest.mark.skipif(not HERE, reason="this transformers has no such family")
def test_an_entry_that_the_dense_model_has_cannot_be_changed():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gemma4_text", **copy.deepcopy(_GEMMA4))
    )
    model.config.pliant_architecture = yaml.safe_load(GEMMA4)
    cut(model.eval(), MIXTURE)
    entries = entries_of(model.config)
    entries[1]["head_dim"] = 24
    model.config.per_layer_config = entries
    with pytest.raises(ArtefactError, match=r"sets 'head_dim' of layer 1 to 24, .* built with 32"):
        transformers.AutoModelForCausalLM.from_config(model.config)


def test_a_guard_of_the_architecture_file_is_refused_where_it_guards_nothing():
    model = pico("llama")
    described(model)
    raw = copy.deepcopy(dict(anatomy_of(model).architecture.raw))
    raw["blocks"]["mlp"]["guard"] = "initializer_range"
    model.config.pliant_architecture = raw
    model.config.per_layer_config = {1: {"skip": ["attention"], "initializer_range": 0.5}}
    with pytest.raises(ArtefactError, match=r"sets 'initializer_range' of layer 1 to 0\.5"):
        transformers.AutoModelForCausalLM.from_config(model.config)


def test_a_per_layer_part_of_a_family_that_neither_knows_is_refused():
    made = config("cohere", hidden_size=48, head_dim=None)
    made.per_layer_config = {1: {"skip": ["mlp"]}}  # transformers alone would build the block
    with pytest.raises(UnknownArchitectureError, match="cohere"):
        transformers.AutoModelForCausalLM.from_config(made)


def test_a_cut_that_cannot_be_made_is_refused_and_never_left_out():
    model = cut(pico("llama"), Subnet().without("layers.1.mlp"))
    raw = copy.deepcopy(dict(anatomy_of(model).architecture.raw))
    model.config.pliant_architecture = raw | {"layers": "model.blocks"}
    with pytest.raises(ArchitectureError, match=r"no list of layers at 'model\.blocks'"):
        transformers.AutoModelForCausalLM.from_config(model.config)


# --- a text decoder in a wrapper
# -----------------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
}
_TEXT |= {"num_key_value_heads": 3, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
_SEES |= {"image_size": 32, "patch_size": 8}
_QWEN_SEES = {"embed_dim": 32, "depth": 5, "num_heads": 4, "hidden_size": 48, "mlp_ratio": 2, "intermediate_size": 48}
_QWEN_SEES |= {"out_hidden_size": 48}
WRAPPED = {
    "qwen2_vl": {"text_config": _TEXT | _MROPE, "vision_config": _QWEN_SEES},
    "qwen2_5_vl": {"text_config": _TEXT | _MROPE, "vision_config": _QWEN_SEES},
    "qwen3_vl": {"text_config": _TEXT | _MROPE, "vision_config": _QWEN_SEES | {"deepstack_visual_indexes": [0]}},
    "gemma3": {"text_config": _TEXT, "vision_config": _SEES},
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _SEES | {"model_type": "clip_vision_model", "projection_dim": 16},
    },
    "mistral3": {"text_config": _TEXT | {"model_type": "mistral"}, "vision_config": _SEES | {"model_type": "pixtral"}},
    "smolvlm": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _SEES},
}
WRAPPED_CUTS = {
    "blocks": Subnet().without("layers.0.attention").without("layers.2.mlp"),
    "widths": Subnet().keeping("layers.1.mlp.channels", 17).keeping("layers.3.attention.kv", 2),
}


def wrapper(name):
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(name, **copy.deepcopy(WRAPPED[name]))
    return transformers.AutoModelForImageTextToText.from_config(made).eval()


@pytest.mark.filterwarnings("ignore")  # of kernels and processors that are not there
@pytest.mark.parametrize("kind", WRAPPED_CUTS)
@pytest.mark.parametrize("name", WRAPPED)
def test_a_cut_text_decoder_in_a_wrapper_reloads_with_the_same_logits(name, kind, tmp_path):
    model = wrapper(name)
    dense = logits(model)
    anatomy = described(model)
    pliant.check(model)
    assert anatomy.depth == 4  # the text's layers, not the 5 that see
    extract(model, anatomy, WRAPPED_CUTS[kind])
    write(model)
    again = reloaded(model, tmp_path / "cut")
    assert not torch.allclose(logits(model), dense, atol=1e-3)
    assert torch.allclose(logits(again), logits(model), atol=5e-6)
    cut(again, Subnet().without("layers.3.mlp"))
    assert torch.allclose(logits(reloaded(again, tmp_path / "further")), logits(again), atol=5e-6)
    with pytest.raises(ArtefactError, match="the text decoder is only one part of"):
        pliant.homogeneous(model)


@pytest.mark.slow
def test_transformers_alone_refuses_a_cut_wrapper(tmp_path):
    for name in ("qwen2_vl", "gemma3", "llava"):
        for kind, subnet in WRAPPED_CUTS.items():
            model = wrapper(name)
            extract(model, described(model), subnet)
            write(model)
            model.save_pretrained(tmp_path / f"{name} {kind}")
    told = without_pliant(f"""
        import pathlib, transformers
        transformers.logging.set_verbosity_error()
        for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
            try:
                transformers.AutoModelForImageTextToText.from_pretrained(folder)
            except Exception as error:
                print(folder.name, type(error).__name__, "ignore_mismatched_sizes" in str(error))
    """)
    kinds = [("blocks", "AmbiguousGlobalPerLayerAttributeError False"), ("widths", "RuntimeError True")]
    assert told == [f"{name} {kind} {error}" for name in ("gemma3", "llava", "qwen2_vl") for kind, error in kinds]


def test_a_classifier_that_holds_only_what_sees_is_refused_with_a_sentence():
    for name, told in (
        ("clip", "tracing is for convolutional"),
        ("siglip2", "the part that its text config describes"),
    ):
        made = transformers.AutoConfig.for_model(name, vision_config=_SEES, text_config=_TEXT)
        model = transformers.AutoModelForImageClassification.from_config(made).eval()
        with pytest.raises(ArchitectureError, match=told):
            described(model)


def test_an_encoder_decoder_whose_decoder_has_no_config_to_write_into_is_refused_before_anything_is_cut():
    shape = {"vocab_size": 300, "d_model": 48, "encoder_layers": 2, "decoder_layers": 4, "decoder_attention_heads": 6}
    made = transformers.AutoConfig.for_model("bart", **shape, decoder_ffn_dim=40, encoder_ffn_dim=40)
    model = transformers.AutoModelForSeq2SeqLM.from_config(made).eval()
    before = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.config.pliant_architecture = {
        "models": ["bart"],
        "layers": "model.decoder.layers",
        "fixed": {"hidden": "d_model"},
        "axes": {"channels": {"size": "decoder_ffn_dim or ffn_dim"}},
        "blocks": {
            "mlp": {
                "module": ["fc1", "fc2"],
                "norms": ["final_layer_norm"],
                "weights": {"fc1": ["channels", "hidden"], "fc2": ["hidden", "channels"]},
            }
        },
    }
    for look in (anatomy_of, described, lambda m: pliant.apply(m, pliant.ChannelPruner(ratio=0.1), progress=False)):
        with pytest.raises(ArchitectureError, match="bart model has no separate decoder config"):
            look(model)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before


# --- what is computed from a config
# --------------------------------------------------------------------------------------

MODERNBERT = """
models: [modernbert]
layers: model.layers
fixed: {hidden: hidden_size}
axes:
  heads:    {size: num_attention_heads, unit: hidden_size // num_attention_heads}
  channels: {size: intermediate_size}
blocks:
  attention:
    module: attn
    norms: [attn_norm]
    output: tuple
    scores: heads
    weights: {Wqkv: [[heads, heads, heads], hidden], Wo: [hidden, heads]}
  mlp:
    module: mlp
    norms: [mlp_norm]
    weights: {Wi: [[channels, channels], hidden], Wo: [hidden, channels]}
"""


def test_rotary_angles_are_those_of_the_dense_model_after_loading(tmp_path):
    shape = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4}
    special = dict.fromkeys(("cls_token_id", "bos_token_id"), 1) | {"sep_token_id": 2, "eos_token_id": 2}
    made = transformers.AutoConfig.for_model(
        "modernbert",
        **shape,
        **special,
        num_attention_heads=4,
        pad_token_id=0,
        global_attn_every_n_layers=2,
        local_attention=4,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(made).eval()
    model.config.pliant_architecture = yaml.safe_load(MODERNBERT)
    pliant.check(model)
    cut(model, MIXTURE.keeping("layers.1.attention.heads", 2))
    again = reloaded(model, tmp_path / "cut")
    assert torch.allclose(logits(again), logits(model), atol=5e-6)
    assert not again.model.rotary_emb.config.is_heterogeneous
    again.set_attn_implementation("eager")  # still reaches the layers
    assert again.model.layers[1].attn.config._attn_implementation == "eager"
    assert torch.allclose(logits(again), logits(model), atol=1e-4)


# --- what models give besides logits
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_weights_and_hidden_states_keep_one_entry_a_layer(name, tmp_path):
    model = pico(name, attn_implementation="eager")
    with torch.inference_mode():
        dense = model(**inputs(model), output_attentions=True, output_hidden_states=True)
        assert all(weights is not None for weights in dense.attentions)
        subnet = Subnet().without("layers.1.attention").without("layers.2.mlp")
        with pliant.activate(model, subnet):
            activated = model(**inputs(model), output_attentions=True, output_hidden_states=True)
        cut(model, subnet)
        again = reloaded(model, tmp_path / "cut", attn_implementation="eager")
        for given in (
            activated,
            model(**inputs(model), output_attentions=True, output_hidden_states=True),
            again(**inputs(again), output_attentions=True, output_hidden_states=True),
        ):
            assert [weights is None for weights in given.attentions] == [False, True, False, False]
            assert len(given.hidden_states) == len(dense.hidden_states) == 5
            assert torch.allclose(given.attentions[0], dense.attentions[0], atol=1e-5)
            assert not torch.allclose(given.attentions[3], dense.attentions[3], atol=1e-5)


def test_a_removed_attention_compiles():
    model = cut(pico("llama"), Subnet().without("layers.1.attention"))
    with torch.inference_mode():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(IDS, use_cache=False).logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_auxiliary_loss_of_experts_is_taken_among_those_that_a_layer_has(name, tmp_path):
    module = sys.modules[type(pico(name)).__module__]
    original = module.load_balancing_loss_func.__wrapped__

    def auxiliary(model):
        with torch.inference_mode():
            return model(input_ids=IDS, labels=IDS, output_router_logits=True)

    dense = auxiliary(pico(name))
    assert dense.aux_loss.item() == original(dense.router_logits, 4, 2, None).item()

    evenly = Subnet(keep=tuple((f"layers.{layer}.mlp.experts", 3) for layer in range(4)))
    given = auxiliary(cut(pico(name), evenly))
    assert given.aux_loss.item() == pytest.approx(original(given.router_logits, 3, 2, None).item())

    model = cut(pico(name), Subnet().keeping("layers.1.mlp.experts", 3).without("layers.2.mlp"))
    given = auxiliary(model)
    routers = given.router_logits
    assert [router.shape[-1] for router in routers] == [4, 3, 4]
    both = [original(routers[::2], 4, 2, None).item(), original(routers[1:2], 3, 2, None).item()]
    assert given.aux_loss.item() == pytest.approx((2 * both[0] + both[1]) / 3)
    assert auxiliary(reloaded(model, tmp_path / "cut")).aux_loss.item() == pytest.approx(
        given.aux_loss.item(), rel=1e-5
    )
    model(input_ids=IDS, labels=IDS, output_router_logits=True).loss.backward()

    none = auxiliary(cut(pico(name), Subnet().without(*(f"layers.{layer}.mlp" for layer in range(4)))))
    assert none.aux_loss.item() == 0
