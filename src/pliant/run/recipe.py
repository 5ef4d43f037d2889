"""A recipe: the description of a run, as a value and as ``recipe.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pliant.data import Text, text
from pliant.digest import path_digest
from pliant.errors import DataError, StepError
from pliant.measure.quality.replies import check_prompts
from pliant.run.target import RECIPE, RECIPE_VERSION, local
from pliant.step import Step, paths_of, recipe_of, step_of

_PLAIN = ("seqlen", "windows", "limit", "speed")
_KEYS = {"recipe", "base_model", "steps", "data", "measuring", "dtype", "read", "versions", "files"}
_OTHER_TEXT = "give the text to use with --data (data=), or restore the file"
_OTHER_FILE = "restore the file, or name another one in the recipe"


@dataclass(frozen=True)
class Measuring:
    """The measurements before and after the steps.

    Attributes:
        perplexity: held-out texts; when empty, rows of the calibration text that the steps do not see.
        tasks: question files.
        seqlen, windows, limit: as in :func:`pliant.evaluate`.
        speed: time prefill and decode of both models, alternating, and measure their disk space and memory.
        prompts: both models reply to these; the report shows the replies side by side.

    Raises:
        DataError: a prompt is empty, or a number or ``speed`` is not allowed.
    """

    perplexity: Sequence[str | Path | Text] = ()
    tasks: Sequence[str | Path] = ()
    seqlen: int = 512
    windows: int | None = 32
    limit: int | None = 200
    speed: bool = True
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        for name, least in (("seqlen", 2), ("windows", 1), ("limit", 1)):
            number = getattr(self, name)
            if (number is not None or name == "seqlen") and (type(number) is not int or number < least):
                optional = "" if name == "seqlen" else ", or none for no limit"
                raise DataError(f"{name} must be a whole number of at least {least}{optional}; not {number!r}")
        if type(self.speed) is not bool:
            raise DataError(f"speed must be true or false; not {self.speed!r}")

    @cached_property
    def texts(self) -> list[Text]:
        """The held-out texts, read from their files."""
        return [one if isinstance(one, Text) else text(one) for one in self.perplexity]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``recipe.yaml``, with a digest of every file."""
        places = [Path(task).expanduser().resolve() for task in self.tasks]
        return {
            "perplexity": [_described(of) for of in self.texts],
            "tasks": [{"path": str(place), "hash": path_digest(str(place))} for place in places],
            **{name: getattr(self, name) for name in _PLAIN},
            "prompts": list(self.prompts),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Measuring:
        """The inverse of :meth:`to_dict`.

        Raises:
            StepError: the data have another form.
            DataError: a file is missing or has changed.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, raw.keys() - set(known))):
            raise StepError(f"measuring has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        for name in ("perplexity", "tasks", "prompts"):
            if not isinstance(raw.get(name, []), list):
                raise StepError(f"{name} under measuring must be a list; not {raw[name]!r}")
        tasks = [{"path": task} if isinstance(task, str) else task for task in raw.get("tasks", [])]
        for task in tasks:
            if not isinstance(task, Mapping) or not isinstance(task.get("path"), str):
                raise StepError(f"each of the tasks under measuring must be the path of a question file; not {task!r}")
            _check_same(task["path"], task.get("hash"), path_digest(task["path"]), _OTHER_FILE)
        texts = [found for of in raw.get("perplexity", []) if (found := _text(of)) is not None]
        plain = {key: raw[key] for key in (*_PLAIN, "prompts") if key in raw}
        return cls(perplexity=texts, tasks=[task["path"] for task in tasks], **plain)


@dataclass(frozen=True)
class Recipe:
    """The description of a run.

    Attributes:
        model: the dense model, as for :func:`pliant.load`.
        steps: applied in this order.
        data: calibration text; None for steps that need none.
        measuring: the measurements before and after.
        dtype: as in :func:`pliant.load`.
    """

    model: str
    steps: list[Step]
    data: Text | None
    measuring: Measuring = Measuring()
    dtype: str = "auto"

    def texts(self) -> tuple[Text | None, list[Text]]:
        """The text for the steps, and the texts to measure on: a tenth of the calibration rows if none are given."""
        if self.measuring.texts or self.data is None:
            return self.data, self.measuring.texts
        calibration, held_out = self.data.split(0.1)
        return calibration, [held_out]

    def measured_tokens(self) -> int:
        """A rough estimate of the tokens in one measurement of quality."""
        of = self.measuring
        texts = len(of.perplexity) or (self.data is not None)
        return texts * (of.windows or 1000) * of.seqlen + len(of.tasks) * (of.limit or 1000) * 64

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and the steps as plain data for ``recipe.yaml``, with a digest of every file.

        :func:`pliant.run.save.save` adds model and steps, which a model that was not made by a run has, too.
        """
        paths = [path for step in self.steps for path in paths_of(step) if Path(path).expanduser().is_file()]
        return {
            "data": None if self.data is None else _described(self.data),
            "measuring": self.measuring.to_dict(),
            "dtype": self.dtype,
            "read": {path: path_digest(path) for path in paths},
        }


def read_recipe(source: str | Path, *, model: str | Path | None = None, data: str | Path | None = None) -> Recipe:
    """A recipe from a ``recipe.yaml``, or from the folder of an artefact.

    Arguments:
        model, data: where the dense model and the calibration text are now, if they are not where the recipe says.

    Raises:
        StepError: the file is not a recipe, or has an unknown step or setting.
        DataError: a file is missing or has changed since the recipe was written, and ``data`` is not given.
    """
    path = Path(source).expanduser()
    path = path / RECIPE if path.is_dir() else path
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StepError(f"cannot read the recipe {str(path)!r}: {error}") from None
    if not isinstance(raw, Mapping) or not isinstance(raw.get("steps"), list):
        raise StepError(f"{str(path)!r} is not a recipe: it has no list of steps")
    version = raw.get("recipe", RECIPE_VERSION)
    if type(version) is not int or version < 1:
        raise StepError(
            f"the version of the recipe {str(path)!r} must be a whole number of at least 1; not {version!r}"
        )
    if version > RECIPE_VERSION:
        raise StepError(
            f"{str(path)!r} was written by a newer pliant; this one reads recipes up to version {RECIPE_VERSION}"
        )
    if unknown := sorted(map(str, raw.keys() - _KEYS)):
        raise StepError(f"{str(path)!r} has the unknown key {unknown[0]!r}; choose from: {', '.join(sorted(_KEYS))}")
    steps = [step_of(of["settings"] if isinstance(of, Mapping) and "settings" in of else of) for of in raw["steps"]]
    for name, kind in (("base_model", str), ("dtype", str), ("measuring", Mapping), ("read", Mapping)):
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            wanted = "a text" if kind is str else "a mapping"
            raise StepError(f"{name} in {str(path)!r} must be {wanted}; not {raw[name]!r}")
    named = model or raw.get("base_model")
    if not named:
        raise StepError(f"{str(path)!r} has no base_model; give the model with --model (model=)")
    for name, noted in (raw.get("read") or {}).items():
        _check_same(str(name), noted, path_digest(str(name)), _OTHER_FILE)
    measuring = Measuring.from_dict(raw.get("measuring") or {})
    return Recipe(local(named), recipe_of(steps), _text(raw.get("data"), data), measuring, raw.get("dtype") or "auto")


def _described(of: Text) -> dict[str, Any]:
    """The place of a text and the digest of its rows."""
    column = {} if of.column == "text" else {"column": of.column}
    return {"path": of.path, "source": of.source, **column, "rows": len(of.rows), "hash": of.digest}


def _text(of: Any, given: str | Path | None = None) -> Text | None:
    """The text that a recipe describes, from its file or from the file given instead."""
    if of is not None and not isinstance(of, str | Mapping):
        raise StepError(f"a text in a recipe must be a path, or a mapping with a path; not {of!r}")
    described = {"path": of} if isinstance(of, str) else dict(of or {})
    column = described.get("column", "text")
    if given is not None:
        return text(given, column=column)
    if not described:
        return None
    path = described.get("path")
    if path is None:
        raise DataError(
            f"the recipe was made with text from {described.get('source', 'a list')}, not from a file; give the text "
            "with --data (data=)"
        )
    if not isinstance(path, str):
        raise StepError(f"the path of a text must be a text; not {path!r}")
    found = text(path, column=column)
    _check_same(path, described.get("hash"), found.digest, _OTHER_TEXT)
    return found


def _check_same(path: str, noted: str | None, found: str | None, remedy: str) -> None:
    if noted is None or noted == found:
        return
    state = (
        "does not exist"
        if found is None
        else f"has changed since the recipe was written: its digest is {found}, not {noted}"
    )
    raise DataError(f"{path!r} {state}; {remedy}")
