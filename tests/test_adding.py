"""Every file that docs/adding.md shows is short and works: in Python, on the command line, resumed, shown, and from its
recipe."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import pliant
from pico import pico, tokenizer
from pliant import progress
from pliant.architecture import known_families
from pliant.cli.main import app
from pliant.errors import ArchitectureError, PliantError, StepError
from pliant.step import Step, step_class

PAGE = (Path(__file__).parent.parent / "docs" / "adding.md").read_text("utf-8")
FILES = dict(re.findall(r"`(\w+\.\w+)`:\n\n```\w+\n(.*?)```", PAGE, flags=re.S))
TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
ROWS = {"ratio": 0.2, "samples": 4, "seqlen": 32}
WIDTHS = {**ROWS, "width_samples": 4, "mlp_group": 8}
EVOLVED = {**WIDTHS, "population": 4, "generations": 3, "tolerance": 0.2}
CASES = {
    "my_scores.py": ("blockpruner", {**ROWS, "metric": "my_scores:TopK"}, "next tokens among the likeliest"),
    "my_searches.py": ("multipruner_evol", {**EVOLVED, "width_search": "my_searches:Annealing"}, "Annealing"),
    "my_importance.py": ("multipruner", {**WIDTHS, "order": "my_importance:l2"}, "order=my_importance:l2"),
    "my_steps.py": ("my_steps:Clip", {"deviations": 2.0}, "weights clipped."),
    "biogpt.yaml": ("multipruner", WIDTHS, "attention heads"),
}
"""File -> a system and settings that use it, and what the report says of it."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with the files of the page."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, "utf-8")
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(known_families, "_added", {})
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == tmp_path:
            del sys.modules[name]


def cli(*words):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(word) for word in words])


def test_every_file_of_the_page_is_in_the_matrix_and_has_at_most_40_lines():
    assert FILES.keys() == CASES.keys()
    assert all(len(content.splitlines()) <= 40 for content in FILES.values())


@pytest.mark.parametrize("file", CASES)
def test_what_a_user_adds_works_like_what_is_there(file, here, prose, monkeypatch):
    system, settings, said = CASES[file]
    model = pico("biogpt", hidden_size=48) if file == "biogpt.yaml" else pico("llama")
    model.save_pretrained(here / "dense")
    tokenizer().save_pretrained(here / "dense")
    if own := ["--architecture", file] if file == "biogpt.yaml" else []:
        with pytest.raises(ArchitectureError, match="no architecture file describes model_type 'biogpt'"):
            pliant.anatomy_of(model)
        pliant.add_architecture(file)
        pliant.check(model)

    pliant.apply(model, step_class(system)(**settings), TEXT, tokenizer=tokenizer(), progress=False)
    (record,) = model.pliant_history
    assert pliant.step_of(record["settings"]).to_dict() == record["settings"]

    pairs = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    shared = ["--no-speed", "--windows", "2", "--json"]

    def compress(out):
        known_families._added.clear()
        return cli(*own, "compress", "dense", "--system", system, *pairs, "--data", prose, "--out", out, *shared)

    whole = compress("whole")
    assert whole.exit_code == 0, whole.output
    shown = json.loads(whole.stdout)["steps"][0]
    fields = {"metric": {"score": "my_scores:TopK", "k": 5}} if "metric" in settings else {}
    assert shown["settings"].items() >= {"step": system, **settings, **fields}.items()
    page, card = ((here / "whole" / name).read_text("utf-8") for name in ("report.html", "README.md"))
    assert f"<h2>{system}</h2>" in page
    assert f"- {system} (" in card
    assert said in page

    class Interrupting(progress.Events):
        left = 6

        def emit(self, event, **_):
            self.left -= event == "step"
            if not self.left:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress, "Events", Interrupting)
        assert compress("small").exit_code != 0
    assert not (here / "small").exists()
    resumed = compress("small")
    assert resumed.exit_code == 0, resumed.output
    same(here / "small", here / "whole")
    if "counters" in shown:
        made = [
            sum(c["evaluations"] for c in json.loads(run.stdout)["steps"][0]["counters"].values())
            for run in (whole, resumed)
        ]
        assert made[1] < made[0]

    known_families._added.clear()
    again = cli(*own, "run", "whole/recipe.yaml", "--out", "again", "--json")
    assert again.exit_code == 0, again.output
    same(here / "again", here / "whole")
    known_families._added.clear()
    assert pliant.load("again").config.model_type == model.config.model_type


def same(folder, other):
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.usefixtures("here")
def test_the_settings_of_a_score_are_in_the_recipe():
    step = pliant.BlockPruner(**ROWS, metric={"score": "my_scores:TopK", "k": 3})
    assert (step.score.k, step.score.key) == (3, "topk:k=3")
    assert step.to_dict()["metric"] == {"score": "my_scores:TopK", "k": 3}
    written = yaml.safe_load(yaml.safe_dump(step.to_dict()))
    assert pliant.step_of(written) == step
    model = pliant.apply(pico("llama"), step, TEXT, tokenizer=tokenizer(), progress=False)
    assert model.pliant_history[0]["settings"] == written
    with pytest.raises(StepError, match=r"cannot make the score my_scores:TopK .* 'colour'"):
        pliant.BlockPruner(**ROWS, metric={"score": "my_scores:TopK", "colour": "red"})


def test_changed_code_is_another_step_and_a_recipe_warns_of_it(here):
    for name, value in (("metric", "my_scores:TopK"), ("order", "my_importance:l2")):
        step = pliant.MultiPruner(**ROWS, **{name: value})
        before = step.to_dict()
        file = here / f"{value.partition(':')[0]}.py"
        file.write_text(file.read_text() + "\n# changed\n")
        assert step.to_dict()["code"] != before["code"]
        with pytest.warns(
            UserWarning, match="multipruner: your code that it uses has changed since the recipe was written"
        ):
            assert pliant.step_of(before).to_dict() == step.to_dict()
    assert "code" not in pliant.MultiPruner(**ROWS).to_dict()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wanda", "unknown system 'wanda'; choose from: blockpruner, .* module:Name"),
        (":Clip", "unknown system ':Clip'"),
        ("my_steps:", "unknown system 'my_steps:'"),
        ("../my_steps:Clip", "unknown system"),
        ("gone:Clip", "cannot import 'gone' for system 'gone:Clip': No module named 'gone'"),
        ("my_steps:Gone", "cannot find system 'my_steps:Gone': .*my_steps.py does not define Gone"),
        ("my_scores:TopK", "system 'my_scores:TopK' must be a class that derives from Step"),
        ("__main__:Clip", "it was defined in a script or a notebook. Move it into a module"),
        ("my_steps:made.<locals>.Clip", "it was defined inside a function. Move it to the top of a module"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_name_of_no_step_is_refused(name, said):
    with pytest.raises(StepError, match=said):
        pliant.step_of({"step": name})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metric": "my_steps:Clip"}, "metric 'my_steps:Clip' must be a class that derives from Score"),
        ({"metric": 3}, "unknown metric 3; choose from: perplexity, kl"),
        ({"order": "my_importance:gone"}, "does not define gone"),
        ({"order": 3}, "unknown order 3; choose from: l1, activation, fisher, stored"),
        ({"width_search": "guess"}, "unknown width_search 'guess'; choose from: nsga2, hill, random, or name"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_setting_that_names_something_else_is_refused_before_any_work(settings, said):
    with pytest.raises(StepError, match=said):
        pliant.MultiPrunerEvol(**{**ROWS, **settings})


def test_a_search_of_another_kind_and_an_importance_of_other_units_are_refused(here):
    (here / "wrong.py").write_text(
        "def few(model, anatomy):\n    return {name: axis.size * model.lm_head.weight[:1, 0] for name, axis in "
        "anatomy.axes.items()}\ndef nan(model, anatomy):\n    return {name: float('nan') * model.lm_head.weight[: "
        "axis.size, 0] for name, axis in anatomy.axes.items()}\ndef nothing(model, anatomy):\n    return None\n"
    )
    model = pico("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step, said in (
        (pliant.MultiPrunerEvol(**ROWS, width_search="my_steps:Clip"), "must be a class that derives from SpaceSearch"),
        (pliant.MultiPruner(**ROWS, order="wrong:few"), "must give a value for each unit of an axis; for 'layers.0"),
        (pliant.MultiPruner(**ROWS, order="wrong:nan"), "gave values for 'layers.0.* that are not finite real numbers"),
        (pliant.MultiPruner(**ROWS, order="wrong:nothing"), "must return a dict of tensors, one for each axis"),
    ):
        with pytest.raises(PliantError, match=said):
            pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_step_that_was_defined_in_a_function_is_applied_and_its_recipe_says_that_it_cannot_be_repeated():
    class Halve(Step):
        reshapes = False

        def run(self, job):
            job.model.lm_head.weight.data.mul_(0.5)

    model = pliant.apply(pico("llama"), Halve(), progress=False)
    written = model.pliant_history[0]["settings"]
    assert written["step"].endswith("<locals>.Halve")
    with pytest.raises(StepError, match=r"it was defined inside a function\. Move it to the top of a module"):
        pliant.step_of(written)


@pytest.mark.parametrize("model_folder", [False, True])
def test_the_program_finds_files_in_the_current_folder_unless_it_is_a_model_folder(model_folder, here):
    (here / "light.py").write_text(
        "import pliant\nclass Wait(pliant.Step):\n    hours: int = pliant.setting('How long.', default=1)\n"
    )
    if model_folder:
        (here / "config.json").write_text("{}")
    program = [sys.executable, "-P", "-c", "from pliant.cli import main; main()", "ls", "light:Wait"]
    outcome = subprocess.run(program, capture_output=True, text=True, check=False)
    if model_folder:
        assert outcome.returncode == 1
        assert "cannot import 'light' for system 'light:Wait'" in outcome.stderr
        assert "which must not be a model folder" in outcome.stderr
    else:
        assert outcome.returncode == 0, outcome.stderr
        assert "hours          How long. Default: 1." in outcome.stdout
