"""Settings of a step: checked by their declaration, described, written down and read again."""

from typing import Optional

import pytest
import torch

import pliant
from pico import pico
from pliant import registry
from pliant.cli.step_options import recipe
from pliant.errors import RatioError, StepError
from pliant.record import Curve
from pliant.step import FormerNameWarning, Step, settings_of
from pliant.step_setting import setting


class Scale(Step):
    kind = "scale"

    factor: float = setting("Multiplies every weight.", default=1.0, above=0, at_most=2)
    times: int = setting("How often.", at_least=1, formerly="repeats")
    mode: str = setting("Which weights.", default="all", choices=("all", "linear"))
    name: str | None = setting("A label.", default=None)
    exact: bool = setting("In float64.", default=False)
    share: float = setting("Share of the weights.", default=0.5, above=0, below=1, error=RatioError)
    others: tuple[str, ...] = setting("Anything.", factory=tuple)


class Twice(Scale):
    kind = "twice"

    factor: float = 2.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"factor": 0}, "factor must be a number above 0 and of at most 2; not 0"),
        ({"factor": "1"}, "factor must be a number above 0 and of at most 2; not '1'"),
        ({"factor": True}, "factor must be a number .*; not True"),
        ({"factor": float("nan")}, "factor must be a number .*; not nan"),
        ({"times": 0}, "times must be a whole number of at least 1; not 0"),
        ({"times": 1.0}, r"times must be a whole number of at least 1; not 1\.0"),
        ({"times": None}, "times must be a whole number of at least 1; not None"),
        ({"mode": "none"}, "mode must be one of all, linear; not 'none'"),
        ({"name": 3}, "name must be a text, or none; not 3"),
        ({"exact": 1}, "exact must be true or false; not 1"),
    ],
)
def test_a_value_outside_the_declaration_is_refused(given, message):
    for step in (Scale, Twice):
        with pytest.raises(StepError, match=message):
            step(**{"times": 1} | given)


@pytest.mark.parametrize("name", ["step", "version", "code", "kind", "needs", "run", "to_dict"])
def test_a_setting_cannot_have_a_name_that_steps_use(name):
    with pytest.raises(StepError, match=f"a setting of Own cannot have the name {name}"):
        type("Own", (Step,), {name: setting("A number.", default=3), "__annotations__": {name: "int"}})


def test_a_step_that_replaces_the_model_is_refused():
    class Replaces(Step):
        def run(self, job):
            job.model = torch.nn.Linear(2, 2)

    with pytest.raises(StepError, match=r"replaces has put another model into job\.model"):
        pliant.apply(torch.nn.Linear(2, 2), Replaces(), progress=False)


def test_a_step_without_a_needed_setting_is_refused_in_a_recipe_and_on_the_command_line():
    with pytest.raises(StepError, match="multipruner needs a value for ratio"):
        pliant.step_of({"step": "multipruner"})
    with pytest.raises(StepError, match="cut needs a value for subnet"):
        recipe(["cut"], {}, [])


class Odd(Step):
    kind = "odd"
    either: int | str = setting("A number or a name.", default=1)
    maybe: Optional[float] = setting("A number or none.", default=None, above=0)  # noqa: UP045
    names: tuple[str, ...] = setting("Names.", default=())


def test_a_text_becomes_the_first_type_that_it_fits_and_a_list_is_not_split_into_letters(monkeypatch):
    monkeypatch.setitem(registry.STEPS, "odd", registry.Entry(__name__, "Odd"))
    assert recipe(["odd"], {}, ["either=5", "maybe=2"]) == [Odd(either=5, maybe=2.0)]
    assert recipe(["odd"], {}, ["either=five", "maybe=none"]) == [Odd(either="five")]
    with pytest.raises(StepError, match="names cannot be given with --set; give it in Python, or in a recipe"):
        recipe(["odd"], {}, ["names=abc"])
    with pytest.raises(StepError, match="maybe must be a number above 0, or none; not 0"):
        Odd(maybe=0)


def test_a_curve_without_a_label_for_every_point_is_refused():
    class Draws(Step):
        reshapes = False

        def run(self, job):
            job.show(Curve("loss", [1, 2], [1, 2], ["first"]))

    with pytest.raises(StepError, match="'loss' has 2 xs, 2 ys and 1 labels"):
        pliant.apply(torch.nn.Linear(2, 2), Draws(), progress=False)


def test_a_setting_may_raise_its_own_error():
    for share in (0, 1, "half"):
        with pytest.raises(RatioError, match=r"share must be a number between 0 and 1 \(exclusive\)"):
            Scale(times=1, share=share)


def test_a_setting_without_default_must_be_given():
    with pytest.raises(TypeError, match="times"):
        Scale()


def test_a_step_is_frozen_and_compares_by_value():
    step = Scale(times=2)
    with pytest.raises(AttributeError):
        step.times = 3
    assert step == Scale(times=2) != Scale(times=3)


def test_another_default_keeps_limits_and_help():
    assert (Twice(times=1).factor, Scale(times=1).factor) == (2.0, 1.0)
    assert settings_of(Twice) == settings_of(Scale)
    assert list(settings_of(Scale)) == ["factor", "times", "mode", "name", "exact", "share", "others"]


def test_a_step_is_written_down_and_read_again():
    step = Scale(times=3, name="x")
    assert step.to_dict()["version"] == 1
    assert Scale.from_dict(step.to_dict()) == step


def test_former_names_are_read_with_a_warning():
    with pytest.warns(FormerNameWarning, match="scale: repeats is now times"):
        assert Scale.from_dict({"step": "scale", "repeats": 4}) == Scale(times=4)


def test_what_another_version_wrote_is_refused():
    with pytest.raises(StepError, match="version 2 was written by a newer pliant"):
        Scale.from_dict({"step": "scale", "version": 2, "times": 1})
    with pytest.raises(StepError, match="scale has no setting colour; it has factor, times"):
        Scale.from_dict({"step": "scale", "times": 1, "colour": "red"})


def test_recipes_of_the_first_version_are_read():
    old = {"step": "recover", "batch": 4, "lr": 1e-3, "every": 5, "clip": 0.5, "distil": 0.5, "memory": "small"}
    with pytest.warns(FormerNameWarning, match="batch is now batch_size"):
        step = pliant.Recover.from_dict(old)
    expected = {"batch_size": 4, "learning_rate": 1e-3, "eval_steps": 5, "max_grad_norm": 0.5}
    assert step == pliant.Recover(**expected, distillation_weight=0.5, gradient_checkpointing=True)


def test_the_kind_of_a_step_names_folders():
    with pytest.raises(StepError, match="the kind of Evil must be made of letters"):
        type("Evil", (Step,), {"kind": "../../evil", "__annotations__": {}})


def test_a_record_that_json_cannot_hold_is_refused_by_the_step():
    class Recorder(Step):
        def run(self, job):
            job.record["found"] = torch.ones(1)

    with pytest.raises(StepError, match=r"recorder has put a value into job\.record"):
        pliant.apply(pico("llama"), Recorder())
