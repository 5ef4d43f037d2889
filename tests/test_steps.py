"""Every registered step: bad settings, refusals, Ctrl-C, resume, what it shows, and its recipe."""

import dataclasses
import importlib
import json

import pytest
import torch
import yaml

import pliant
from pico import pico, tokenizer
from pliant.errors import PliantError
from pliant.progress import Progress
from pliant.registry import STEPS
from pliant.run.card import card
from pliant.run.compress import compress
from pliant.run.recipe import Measuring
from pliant.step import settings_of, step_class

TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
ROWS = {"samples": 8, "seqlen": 32}
WIDTHS = {**ROWS, "width_samples": 8, "mlp_group": 8}
SETTINGS = {
    "blockpruner": {"ratio": 0.2, **ROWS, "repair": 4},
    "multipruner": {"ratio": 0.2, **WIDTHS},
    "multipruner_evol": {"ratio": 0.2, **WIDTHS, "population": 4, "generations": 3, "tolerance": 0.2},
    "mamba_shedder": {"ratio": 0.2, **ROWS},
    "oneshot": {"ratio": 0.2, **ROWS},
    "unified": {"ratio": 0.1, **ROWS, "mlp_group": 8},
    "knapsack": {"ratio": 0.2, **ROWS, "levels": 2, "swaps": 2, "group": 8},
    "fisher": {"ratio": 0.2, **ROWS, "group": 8},
    "channelpruner": {"ratio": 0.2},
    "cut": {"subnet": {"skip": ["layers.1.mlp"], "keep": {"layers.2.mlp.channels": 24}}},
    "sparamx": {"sparsity": 0.5},
    "magnitude": {"sparsity": 0.5},
    "rtn": {"bits": 4, "group": 16},
    "packed": {"format": "int8"},
    "recover": {"steps": 4, "seqlen": 32, "batch_size": 4, "eval_steps": 2, "method": "full"},
}
"""Settings with which each step takes a second on a pico model. A new step has a line here."""


def step_of(kind, **others):
    return step_class(kind)(**{**SETTINGS[kind], **others})


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def apply(model, step, **others):
    return pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=others.pop("progress", False), **others)


class Interrupting(Progress):
    """Ctrl-C at the first sign of work."""

    def emit(self, event, **_):
        if event == "step":
            raise KeyboardInterrupt


def test_every_step_is_in_the_matrix():
    assert SETTINGS.keys() == STEPS.keys()


@pytest.mark.parametrize("kind", STEPS)
def test_a_bad_setting_is_refused_by_its_name(kind):
    checked = [
        field
        for field in dataclasses.fields(step_class(kind))
        if settings_of(step_class(kind))[field.name].choices
        or str(field.type).split(" ")[0] in ("int", "float", "bool")
    ]
    assert checked
    for field in checked:
        for value in ("nonsense", [1]):
            with pytest.raises(PliantError, match=field.name):
                step_of(kind, **{field.name: value})


@pytest.mark.parametrize("kind", STEPS)
def test_a_recipe_gives_the_same_step_again(kind):
    step = step_of(kind)
    written = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(step.to_dict()))))
    again = pliant.step_of(written)
    assert type(again) is type(step)
    assert again.to_dict() == step.to_dict()
    with pytest.raises(PliantError, match="newer pliant"):
        pliant.step_of(written | {"version": step.version + 1})
    with pytest.raises(PliantError, match="no setting colour"):
        pliant.step_of(written | {"colour": "red"})


@pytest.mark.parametrize("kind", STEPS)
def test_a_refusal_leaves_the_model_as_it_was(kind):
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    before = {name: tensor.nan_to_num() for name, tensor in state(model).items()}
    with pytest.raises(PliantError):
        apply(model, step_of(kind))
    for tensor in model.state_dict().values():
        tensor.nan_to_num_()
    assert same(model, before)
    assert not hasattr(model, "pliant_history")


IN_PLACE = ("magnitude", "rtn", "sparamx")
"""Steps that change one weight after the other, without memory for the original ones; the exception says so."""


@pytest.mark.parametrize("kind", [kind for kind in STEPS if kind not in IN_PLACE])
def test_ctrl_c_leaves_the_model_as_it_was(kind):
    model = pico("llama")
    before, kinds = state(model), [type(module) for module in model.modules()]
    try:
        apply(model, step_of(kind), progress=Interrupting())
    except KeyboardInterrupt:
        assert same(model, before)
        assert [type(module) for module in model.modules()] == kinds
        assert not hasattr(model, "pliant_history")
    else:
        assert kind in ("cut", "channelpruner", "oneshot")  # over before there is anything to show


@pytest.mark.parametrize("kind", IN_PLACE)
def test_ctrl_c_in_a_change_in_place_says_what_has_changed(kind, monkeypatch):
    module, name = ("rtn", "round_to_grid") if kind == "rtn" else ("magnitude", "zero_smallest")
    change, calls = getattr(importlib.import_module(f"pliant.values.{module}"), name), []

    def interrupted(*given, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return change(*given, **settings)

    monkeypatch.setattr(f"pliant.values.{module}.{name}", interrupted)
    model = pico("llama")
    with pytest.raises(KeyboardInterrupt) as stopped:
        apply(model, step_of(kind))
    assert stopped.value.__notes__ == ["3 of 28 weight matrices may have been changed; load the model again"]
    assert not hasattr(model, "pliant_history")


def test_ctrl_c_in_packing_after_a_change_in_place_says_so():
    model = pico("llama")
    with pytest.raises(KeyboardInterrupt) as stopped:
        apply(model, step_of("sparamx"), progress=Interrupting())
    assert stopped.value.__notes__ == ["the smallest weights have been set to zero already; load the model again"]
    before = state(model)
    with pytest.raises(KeyboardInterrupt) as stopped:
        apply(model, step_of("sparamx", sparsity=None), progress=Interrupting())
    assert not hasattr(stopped.value, "__notes__")
    assert same(model, before)


def test_a_model_that_cannot_be_packed_is_refused_before_its_weights_are_changed():
    layer = torch.nn.Linear(8, 8)
    before = state(layer)
    with pytest.raises(PliantError, match="cannot be replaced in place"):
        apply(layer, step_of("sparamx"))
    assert same(layer, before)


@pytest.mark.parametrize("kind", STEPS)
def test_a_run_stopped_after_the_step_resumes_equal_and_its_record_is_shown(kind, folder, prose, tmp_path):
    class Stopping(Progress):
        def emit(self, event, **fields):
            if event == "note" and fields["text"].startswith("measuring the cut"):
                raise KeyboardInterrupt

    def run(name, progress):
        measuring = Measuring(seqlen=32, windows=2, speed=False)
        return compress(folder, step_of(kind), prose, tmp_path / name, measuring=measuring, progress=progress)

    whole = run("whole", Progress())
    with pytest.raises(KeyboardInterrupt):
        run("small", Stopping())
    again = run("small", Progress())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again["after"]["quality"] == whole["after"]["quality"]
    assert not (tmp_path / "small.work").exists()
    (record,) = again["steps"]
    page = (tmp_path / "small" / "report.html").read_text("utf-8")
    shown = (tmp_path / "small" / "README.md").read_text("utf-8")
    assert f"<h2>{kind}</h2>" in page
    assert f"- {kind} (" in shown
    for section in record.get("sections", []):
        if section["section"] == "note":
            assert section["text"].split(" ")[0] in page
            assert section["text"] in shown
        if section["section"] == "table":
            assert section["columns"][0] in page
    assert card(pliant.load(tmp_path / "small"), [record], None)
