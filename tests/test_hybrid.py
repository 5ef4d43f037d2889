"""A model with two kinds of mixers and an MLP that layers share, described by an architecture file alone."""

import json

import pytest
import torch
import transformers

import pliant
from pico import IDS, logits, tokenizer
from pliant.anatomy import anatomy_of
from pliant.architecture import add_architecture, known_families
from pliant.elastic import Elastic, Subnet, check, extract, parameters, validate
from pliant.errors import ArchitectureError, SubnetError
from pliant.progress import Progress
from pliant.prune.repair import repair

CONFIGURATION = """
from transformers import LlamaConfig

class TrioConfig(LlamaConfig):
    model_type = "NAME"
    gate_size: int = 20
    layer_types: list | None = None
"""
MODELING = """
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from .configuration_trio import TrioConfig


class TrioGate(nn.Module):
    '''A mixer that looks at one token and keeps nothing.'''

    def __init__(self, config):
        super().__init__()
        self.value = nn.Linear(config.hidden_size, config.gate_size)
        self.gate = nn.Linear(config.hidden_size, config.gate_size)
        self.strength = nn.Parameter(torch.ones(config.gate_size))
        self.out = nn.Linear(config.gate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.out(torch.sigmoid(self.gate(hidden_states)) * self.value(hidden_states) * self.strength)


class TrioLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attends = config.layer_types[layer_idx] == "full_attention"
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = LlamaAttention(config, layer_idx) if self.attends else TrioGate(config)
        self.mlp_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states, **kwargs):
        normed = self.norm(hidden_states)
        mixed = self.mixer(hidden_states=normed, **kwargs)[0] if self.attends else self.mixer(normed)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class TrioModel(LlamaModel):
    config_class = TrioConfig
    _tied_weights_keys = {
        f"layers.{i}.mlp.{name}.weight": f"layers.1.mlp.{name}.weight"
        for i in (2, 3) for name in ("gate_proj", "up_proj", "down_proj")
    }

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(TrioLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class TrioForCausalLM(LlamaForCausalLM):
    config_class = TrioConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TrioModel(config)
        self.post_init()
"""
LAYOUT = """
models: [NAME]
layers: model.layers
fixed: {hidden: hidden_size}
axes:
  kv:       {size: num_key_value_heads, unit: head_dim}
  heads:    {size: num_attention_heads, unit: head_dim, follows: kv}
  gates:    {size: gate_size}
  channels: {size: intermediate_size}
blocks:
  looker:                       # a name of its own: what it is says its role
    role: attention
    when: [full_attention]
    module: mixer
    norms: [norm]
    output: tuple
    slot: layer_idx
    scores: heads
    weights:
      q_proj: [heads, hidden]
      k_proj: [kv, hidden]
      v_proj: [kv, hidden]
      o_proj: [hidden, heads]
  gate:
    when: [moe]                 # the layer type that transformers gives no cache
    module: mixer
    norms: [norm]
    weights:
      value: [gates, hidden]
      gate: [gates, hidden]
      strength: [gates]
      out: [hidden, gates]
  mlp:
    module: mlp
    norms: [mlp_norm]
    tied: true                  # layers 1, 2 and 3 share one
    weights:
      gate_proj: [channels, hidden]
      up_proj: [channels, hidden]
      down_proj: [hidden, channels]
"""
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 36,
    "intermediate_size": 48,
    "gate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "layer_types": ["full_attention", "moe", "full_attention", "moe", "full_attention"],
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED = "tied.layers.1.mlp.channels"
CUTS = {
    "first attention": Subnet().without("layers.0.looker"),
    "a gate": Subnet().without("layers.1.gate"),
    "all gates": Subnet().without("layers.1.gate", "layers.3.gate"),
    "the first place of the shared MLP": Subnet().without("layers.1.mlp"),
    "two places of the shared MLP": Subnet().without("layers.1.mlp", "layers.3.mlp"),
    "the shared MLP": Subnet().without("layers.1.mlp", "layers.2.mlp", "layers.3.mlp"),
    "shared channels": Subnet().keeping(SHARED, 17),
    "gates": Subnet().keeping("layers.1.gate.gates", 7).keeping("layers.3.gate.gates", 1),
    "everything": Subnet()
    .without("layers.0.looker", "layers.1.mlp", "layers.3.gate")
    .keeping(SHARED, 9)
    .keeping("layers.0.mlp.channels", 11)
    .keeping("layers.2.looker.kv", 2)
    .keeping("layers.1.gate.gates", 5),
}


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """The name of the family; its layout is known."""
    monkeypatch.setattr(known_families, "_added", {})
    name = f"trio_{tmp_path.name}"  # transformers remembers the classes of a name for as long as the process lasts
    (tmp_path / "trio.yaml").write_text(LAYOUT.replace("NAME", name))
    add_architecture(tmp_path / "trio.yaml")
    return name


@pytest.fixture
def model(layout, tmp_path):
    source = tmp_path / f"source_{layout}"
    source.mkdir()
    (source / "configuration_trio.py").write_text(CONFIGURATION.replace("NAME", layout))
    (source / "modeling_trio.py").write_text(MODELING)
    own = {"AutoConfig": "configuration_trio.TrioConfig", "AutoModelForCausalLM": "modeling_trio.TrioForCausalLM"}
    config = SHAPE | {"model_type": layout, "architectures": ["TrioForCausalLM"], "auto_map": own}
    (source / "config.json").write_text(json.dumps(config))
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tokenizer().save_pretrained(source)
    made.save_pretrained(source)
    return pliant.load(source, trust_remote_code=True)


def generated(model, **options):
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.generate(IDS, pad_token_id=0, **given, **options)


def test_the_layout_is_read_and_proven(model):
    anatomy = anatomy_of(model)
    check(model, anatomy)
    shown = pliant.inspect(model)
    assert shown["parameters"] == sum(p.numel() for p in model.parameters()) == parameters(anatomy)
    assert {b.role for b in anatomy.blocks.values()} == {"attention", "other", "mlp"}
    assert [b.name for b in anatomy.blocks.values() if b.kind == "gate"] == ["layers.1.gate", "layers.3.gate"]
    assert {b.tied for b in anatomy.blocks.values()} == {None, "layers.1.mlp"}
    assert {name for name in anatomy.axes if "mlp" in name} == {
        "layers.0.mlp.channels",
        SHARED,
        "layers.4.mlp.channels",
    }
    assert len(anatomy.may_go()) == len(anatomy.blocks)
    with pytest.raises(SubnetError, match="every looker block of the full_attention layers would be removed"):
        validate(Subnet().without("layers.0.looker", "layers.2.looker", "layers.4.looker"), anatomy)


@pytest.mark.parametrize(("gone", "fits"), [((), {}), (("layers.1.mlp", "layers.3.mlp"), {"layers.2.mlp"})])
def test_repair_leaves_a_matrix_that_several_layers_use(model, gone, fits):
    anatomy = anatomy_of(model)
    found = repair(model, anatomy, Subnet().without("layers.1.gate", *gone), IDS, 1.0, Progress())
    places = {f"layers.{layer}.mlp" for layer in (1, 2, 3)}
    shared = {fit["block"]: fit["distance"] for fit in found if fit["block"] in places}
    assert {name for name, distance in shared.items() if distance is not None} == set(fits)


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_is_exact_activated_extracted_reloaded_and_cached(kind, model, tmp_path):
    anatomy, dense = anatomy_of(model), logits(model)
    with pliant.activate(model, CUTS[kind]):
        activated = logits(model)
    assert torch.equal(logits(model), dense)
    assert not torch.allclose(activated, dense, atol=1e-3)
    extract(model, anatomy, CUTS[kind])
    assert torch.allclose(logits(model), activated, atol=5e-6)
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, CUTS[kind])
    pliant.save(model, tmp_path / "cut")
    again = pliant.load(tmp_path / "cut", trust_remote_code=True)
    assert torch.allclose(logits(again), activated, atol=5e-6)
    assert sum(p.numel() for p in again.parameters()) == parameters(anatomy, CUTS[kind])
    whole = generated(again, use_cache=False)
    assert generated(again).equal(whole)
    assert generated(model).equal(whole)


def test_any_walk_through_subnets_computes_the_same_as_going_there_at_once(model):
    elastic = Elastic(model)
    there = {}
    for kind, subnet in CUTS.items():
        with pliant.activate(model, subnet):
            there[kind] = logits(model)
    for kind in [*CUTS, *reversed(CUTS)]:
        elastic.activate(CUTS[kind])
        assert torch.equal(logits(model), there[kind]), kind
    elastic.activate(Subnet())


def test_pruners_offer_every_block(model, tmp_path):
    text = pliant.text(["the cat sat on the mat and looked at the dog " * 4] * 20)
    step = pliant.MultiPruner(ratio=0.3, samples=4, seqlen=32)
    pliant.apply(model, step, text, tokenizer=tokenizer(), progress=False)
    pliant.save(model, tmp_path / "cut")
    again = pliant.load(tmp_path / "cut", trust_remote_code=True)
    assert torch.allclose(logits(again), logits(model), atol=5e-6)
    assert generated(again).equal(generated(again, use_cache=False))


def test_blocks_that_share_tensors_unsaid_are_refused(model):
    raw = dict(anatomy_of(model).architecture.raw)
    raw["blocks"] = {**raw["blocks"], "mlp": {**raw["blocks"]["mlp"], "tied": False}}
    model.config.pliant_architecture = raw
    with pytest.raises(ArchitectureError, match=r"layers\.2\.mlp shares tensors with layers\.1\.mlp"):
        anatomy_of(model)
