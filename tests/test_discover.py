"""Families that no architecture file describes."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers

import pico
import pliant
from pliant.anatomy import anatomy_of
from pliant.checkpoint.per_layer_config import write
from pliant.elastic import Subnet, described, extract
from pliant.errors import ArchitectureError, UnknownArchitectureError

COMMON = ("olmo", "cohere", "olmo3", "arcee", "nemotron", "seed_oss", "apertus", "exaone4")
IDS = torch.tensor([[5, 17, 101, 3, 77, 250, 9, 41, 12]])


def unknown(name, **overrides):
    """A tiny model of a family without an architecture file."""
    shape = {**pico._SHAPE, "hidden_size": 48, "intermediate_size": 40}
    del shape["head_dim"]
    config = transformers.AutoConfig.for_model(name, **shape | overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # some of these families warn about kernels that are not there
def test_common_layouts_are_read_cut_saved_and_reloaded_in_a_fresh_process(tmp_path):
    expected = {}
    for name in COMMON:
        model = unknown(name)
        with pytest.raises(UnknownArchitectureError, match=name):
            anatomy_of(model)
        anatomy = described(model)
        assert len(anatomy.blocks) == 8
        subnet = Subnet().without("layers.0.attention").without("layers.2.mlp").keeping("layers.1.mlp.channels", 17)
        with pliant.activate(model, subnet):
            expected[name] = logits(model)
        extract(model, anatomy, subnet)
        assert torch.allclose(logits(model), expected[name], atol=1e-5)
        write(model)
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["pliant_architecture"]["models"] == [name]
    program = textwrap.dedent(f"""
        import pathlib, torch, pliant
        from transformers import AutoModelForCausalLM
        ids = torch.tensor({IDS.tolist()})
        for folder in pathlib.Path({str(tmp_path)!r}).iterdir():
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.inference_mode():
                print(folder.name, model(ids, use_cache=False).logits.double().abs().sum().item())
    """)
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    told = dict(line.split() for line in outcome.stdout.splitlines())
    assert set(told) == set(COMMON), outcome.stderr
    for name, total in told.items():
        assert float(total) == pytest.approx(expected[name].double().abs().sum().item(), rel=1e-5)


def test_a_shared_norm_is_listed_for_both_blocks():
    model = unknown("cohere")
    described(model)
    blocks = model.config.pliant_architecture["blocks"]
    assert blocks["attention"]["norms"] == blocks["mlp"]["norms"] == ["input_layernorm"]


def test_heads_stay_together_where_a_norm_spans_them():
    model = unknown("olmo3")
    assert not any(".attention." in axis for axis in described(model).axes)


@pytest.mark.parametrize(
    ("name", "told"),
    [("codegen", "modules that could be its attention"), ("rwkv", "modules that could be its attention")],
)
def test_an_uncommon_layout_is_refused_with_the_reason(name, told):
    model = unknown(name)
    with pytest.raises(ArchitectureError, match=f"'{name}'.*{told}.*Write an architecture file: see.*--architecture"):
        described(model)
    assert not hasattr(model.config, "pliant_architecture")


def test_a_wrong_guess_is_refused_by_the_self_check(monkeypatch):
    """A model whose attention does more than its four matrices say."""
    model = unknown("olmo")
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def other(self, hidden_states, *args, **kwargs):
        out, weights = forward(self, hidden_states, *args, **kwargs)
        return out + self.q_proj(hidden_states), weights  # leaks a head's queries past the output matrix

    monkeypatch.setattr(attention, "forward", other)
    with pytest.raises(ArchitectureError, match="the inferred layout failed the self-check"):
        described(model)


def test_steps_and_inspect_discover_by_themselves():
    model = unknown("olmo")
    text = pliant.text(["the cat sat on the mat and looked at the dog " * 4] * 20)
    pliant.apply(
        model, pliant.BlockPruner(ratio=0.1, samples=4, seqlen=32), text, tokenizer=pico.tokenizer(), progress=False
    )
    assert pliant.inspect(model)["architecture"] == "olmo"
