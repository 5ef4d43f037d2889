"""The tables of public names: true, in step with the type stubs, and light."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

import pliant
from pico import pico, tokenizer
from pliant import registry
from pliant.criteria import by_falling, l1_orders
from pliant.criteria.activation import activation_sizes
from pliant.criteria.importance import reads_text
from pliant.errors import ArtefactError, DataError, PliantError, StepError
from pliant.measure.scores import score_of
from pliant.searches import SpaceSearch, search_of
from pliant.step import step_class

TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(pliant.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    stubs = {alias.asname: node.module for node in block.body for alias in node.names}
    assert stubs == registry.public(), "run make generate"


@pytest.mark.parametrize("name", registry.public())
def test_every_public_name_is_what_it_says_and_no_package_hides_it(name):
    value = getattr(pliant, name)
    assert value.__name__ == name
    assert importlib.util.find_spec(f"pliant.{name}") is None
    assert name in dir(pliant)


@pytest.mark.parametrize("kind", registry.STEPS)
def test_every_step_is_known_by_its_name_and_says_what_it_is(kind):
    cls = step_class(kind)
    assert cls.kind == kind
    assert cls.family in ("pruner", "values", "training")
    assert cls.needs <= {"text", "examples", "ratio", "trained"}
    assert getattr(pliant, registry.STEPS[kind].name) is cls


def test_scores_searches_and_importances_are_what_the_tables_say():
    assert all(score_of(name).name == name for name in registry.SCORES)
    assert all(issubclass(search_of(name), SpaceSearch) for name in registry.SEARCHES)
    assert {name for name in registry.IMPORTANCE if reads_text(name)} == {"activation", "fisher"}
    for table in (registry.STEPS, registry.SCORES, registry.SEARCHES, registry.IMPORTANCE, registry.EXPORTS):
        for name, entry in table.items():
            assert entry.summary
            assert registry.name_of(table, registry.find(table, name, "thing")) == name


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"step": "wanda"}, "unknown system 'wanda'; choose from: blockpruner"),
        ({"ratio": 0.2}, "a step is written as"),
        ("multipruner", "a step is written as"),
        ({"step": "rtn", "colour": "red"}, "rtn has no setting colour"),
        ({"step": "rtn", "version": 99}, "newer pliant"),
        ({"step": "rtn", "version": "1.x"}, "version .*'1.x'"),
    ],
)
def test_a_recipe_of_no_step_is_refused(raw, said):
    with pytest.raises(StepError, match=said):
        pliant.step_of(raw)


def test_importance_is_what_pruners_go_by():
    model = pico("llama")
    anatomy = pliant.anatomy_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_weights = by_falling(pliant.importance(model), anatomy)
    assert all(torch.equal(by_weights[axis], order) for axis, order in l1_orders(model, anatomy).items())
    found = pliant.importance(model, by="activation", data=TEXT, tokenizer=tokenizer(), samples=8, seqlen=32)
    windows = TEXT.sample(8, 42).windows(tokenizer(), 32)
    orders = by_falling(activation_sizes(model, anatomy, windows), anatomy)
    assert {axis: order.tolist() for axis, order in by_falling(found, anatomy).items()} == {
        axis: order.tolist() for axis, order in orders.items()
    }
    damage = pliant.importance(model, by="fisher", data=TEXT, tokenizer=tokenizer(), samples=8, seqlen=32)
    assert damage.keys() == found.keys()
    assert all(values.shape == found[axis].shape and values.min() >= 0 for axis, values in damage.items())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_an_unknown_importance_and_missing_text_are_refused():
    with pytest.raises(
        PliantError,
        match="unknown importance 'taste'; choose from: l1, activation, fisher, or name your own as module:Name",
    ):
        pliant.importance(pico("llama"), by="taste")
    with pytest.raises(DataError, match="importance by fisher is read from calibration text"):
        pliant.importance(pico("llama"), by="fisher")


def test_export_is_a_function(folder, tmp_path):
    assert pliant.export(str(folder), tmp_path / "plain") == tmp_path / "plain"
    assert pliant.load(tmp_path / "plain").config.num_hidden_layers == 4
    with pytest.raises(ArtefactError, match="unknown export format 'onnx'; choose from: homogeneous"):
        pliant.export(str(folder), tmp_path / "other", to="onnx")
