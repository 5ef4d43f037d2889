"""`pliant run` and `pliant plan`: the recipe of an artefact, read, planned and repeated."""

import dataclasses
import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

import pliant
from pliant.cli.main import app
from pliant.errors import DataError, StepError
from pliant.progress import Progress
from pliant.run.compress import compress, stages
from pliant.run.recipe import Measuring, read_recipe

QUICK = Measuring(seqlen=32, windows=4, speed=False)
STEP = pliant.BlockPruner(ratio=0.2, samples=8, seqlen=32)


@pytest.fixture
def made(folder, prose, tmp_path):
    text = tmp_path / "notes.txt"
    shutil.copyfile(prose, text)
    steps = [STEP, pliant.Magnitude(sparsity=0.5)]
    compress(folder, steps, text, tmp_path / "small", measuring=QUICK, progress=Progress())
    return tmp_path / "small"


def test_an_artefact_is_made_again_from_its_recipe(made, tmp_path):
    read = read_recipe(made)
    assert read.steps == [STEP, pliant.Magnitude(sparsity=0.5)]
    assert read.measuring == Measuring(perplexity=[], tasks=[], seqlen=32, windows=4, speed=False, prompts=[])
    shown = CliRunner().invoke(app, ["run", str(made / "recipe.yaml"), "--out", str(tmp_path / "again"), "--json"])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    report = json.loads((made / "report.json").read_text())
    assert json.loads(shown.stdout)["after"]["quality"] == report["after"]["quality"]


def test_data_that_moved_or_changed_is_refused_until_it_is_given(made, tmp_path):
    text = tmp_path / "notes.txt"
    text.rename(tmp_path / "moved.txt")
    with pytest.raises(DataError, match="no file at"):
        read_recipe(made)
    assert read_recipe(made, data=tmp_path / "moved.txt").data.digest
    text.write_text((tmp_path / "moved.txt").read_text() + "\n\nOne more.")
    with pytest.raises(DataError, match="has changed since the recipe was written"):
        read_recipe(made)
    assert len(read_recipe(made, data=text).data.rows) == 201


def test_a_plan_names_every_stage_and_does_nothing(made, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = pliant.plan(made)
    assert sorted(tmp_path.rglob("*")) == before
    names = ["load", "measure before", "1-blockpruner", "2-magnitude", "measure after", "time", "write"]
    assert [stage["stage"] for stage in found["stages"]] == names
    dense = pliant.load(tmp_path / "pico-llama")
    assert found["parameters"] == sum(p.numel() for p in dense.parameters())
    assert found["weight_bytes"] == 4 * found["parameters"]
    assert found["stages"][2]["seconds"] >= found["stages"][0]["seconds"]
    shown = CliRunner().invoke(app, ["plan", str(made), "--json"])
    assert json.loads(shown.stdout)["parameters"] == found["parameters"]
    assert "1-blockpruner" in CliRunner().invoke(app, ["plan", str(made)]).stdout


def test_a_run_does_the_stages_of_its_plan(made, tmp_path, monkeypatch):
    done = []

    def watched(recipe):
        return [
            dataclasses.replace(stage, run=lambda run, stage=stage: (done.append(stage.name), stage.run(run)))
            for stage in stages(recipe)
        ]

    monkeypatch.setattr("pliant.run.compress.stages", watched)
    pliant.run_recipe(made, tmp_path / "again", progress=Progress())
    assert done == [stage["stage"] for stage in pliant.plan(made)["stages"]]


def test_a_recipe_by_hand_is_short(folder, prose, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"base_model": str(folder), "steps": [{"step": "rtn", "bits": 8}], "data": str(prose)})
    )
    read = read_recipe(path)
    assert (read.steps, read.dtype) == ([pliant.RTN(bits=8)], "auto")
    assert len(read.data.rows) == 200


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("[1, 2]", "is not a recipe"),
        ("{", "cannot read the recipe"),
        ("steps: [{step: wanda}]", "wanda"),
        ("steps: [{step: rtn}]", "has no base_model; give the model"),
        ("{recipe: 9, steps: []}", "newer pliant"),
        ("{base_model: x, steps: [], data: 3}", "a text in a recipe must be a path, or a mapping with a path; not 3"),
        ("{base_model: x, steps: [], data: {path: 3}}", "the path of a text must be a text; not 3"),
        ("{base_model: x, steps: [], dtype: [1]}", r"dtype in .* must be a text; not \[1\]"),
        ("{base_model: x, steps: [], measuring: 3}", "measuring in .* must be a mapping; not 3"),
        ("{base_model: x, steps: [], read: x}", "read in .* must be a mapping; not 'x'"),
        ("{base_model: x, steps: [], measuring: {window: 3}}", "measuring has no setting window; it has perplexity"),
        ("{base_model: x, steps: [], measuring: {tasks: q}}", "tasks under measuring must be a list; not 'q'"),
        ("{base_model: x, steps: [], measuring: {tasks: [3]}}", "must be the path of a question file; not 3"),
        ("{base_model: x, steps: [], measuring: {perplexity: a}}", "perplexity under measuring must be a list"),
    ],
)
def test_what_is_no_recipe_is_refused(raw, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(raw)
    with pytest.raises(StepError, match=said):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"windows": "x"}, "windows must be a whole number of at least 1, or none for no limit; not 'x'"),
        ({"windows": 0}, "windows must be .*; not 0"),
        ({"limit": -1}, "limit must be .*; not -1"),
        ({"seqlen": None}, "seqlen must be a whole number of at least 2; not None"),
        ({"speed": "no"}, "speed must be true or false; not 'no'"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused_before_any_work(given, said):
    with pytest.raises(DataError, match=said):
        Measuring(**given)


def test_a_recipe_is_repeated_from_another_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    compress(folder.name, pliant.RTN(), None, tmp_path / "small", measuring=QUICK, progress=Progress())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_recipe(tmp_path / "small").model == str(folder.resolve())
    assert pliant.plan(tmp_path / "small")["parameters"] > 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipe": None}, "version of the recipe .* must be a whole number"),
        ({"recipe": 0}, "version of the recipe .* must be a whole number"),
        ({"recipe": 99}, "newer pliant"),
        ({"colour": "red"}, "unknown key 'colour'; choose from: base_model, data"),
        ({"steps": [{"step": "rtn", "version": 0}]}, "version of rtn must be a whole number of at least 1"),
    ],
)
def test_a_recipe_with_a_wrong_version_or_an_unknown_key_is_refused(tmp_path, changed, said):
    raw = {"recipe": 2, "base_model": "x", "steps": [{"step": "rtn"}]} | changed
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(StepError, match=said):
        pliant.plan(tmp_path)
