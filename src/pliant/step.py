"""Step: one thing that is done to a model, as one config dataclass. A recipe is a list of steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import shutil
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pliant.errors import PliantError, StepError
from pliant.files import replacing
from pliant.progress import Progress
from pliant.record import Curve, Section, to_dict
from pliant.registry import STEPS, code_digest, find, name_of, short_name
from pliant.step_setting import Setting, setting


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting, dataclasses.field))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Base of every step: one thing that is done to a model, with its settings.

    A subclass becomes a frozen dataclass by itself. It lists its settings with :func:`setting` and implements
    :meth:`run`; a setting of its base class gets another default by ``name: type = default``.
    """

    kind: ClassVar[str] = ""
    """Name of the step in messages and folders; by default its name in the registry, or the name of the class in small
    letters."""

    version: ClassVar[int] = 1
    """Raised when a setting comes to mean something else."""

    family: ClassVar[str] = ""
    """pruner, values or training: what kind of step it is."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The inputs that it requires: ``text`` (calibration text), ``examples`` (text or examples to train on), ``ratio``
    (a ratio to reach), ``trained`` (a model that an earlier step has prepared)."""

    trains: ClassVar[bool] = False
    """Whether it trains the model, for which all weights have to be in memory."""

    reshapes: ClassVar[bool] = True
    """Whether it changes what tensors a model has; if not, the model's config stays as it is."""

    keeps: ClassVar[tuple[str, ...]] = ()
    """Files in its folder that become part of the artefact, so that a run that overwrites it can start from them."""

    packs: ClassVar[bool] = False
    """Whether it packs the model, after which no other step can follow."""

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "kind" not in vars(cls):
            cls.kind = short_name(STEPS, cls)
        for name in vars(cls).get("__annotations__", ()):
            inherited = {} if name not in _fields(cls) else _fields(cls)[name].metadata
            if inherited and not isinstance(vars(cls).get(name), dataclasses.Field):
                setattr(cls, name, dataclasses.field(default=vars(cls)[name], metadata=inherited))
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if taken := sorted(settings_of(cls).keys() & {"step", "code", *vars(Step)}):
            raise StepError(
                f"a setting of {cls.__name__} cannot have the name {', '.join(taken)}, which steps use; rename it"
            )
        if not re.fullmatch(r"[\w.:-]*", cls.kind):  # it names folders
            raise StepError(f"the kind of {cls.__name__} must be made of letters, digits and '_'; not {cls.kind!r}")

    def __post_init__(self) -> None:
        kinds = _types(type(self))
        for name, of in settings_of(type(self)).items():
            of.check(name, getattr(self, name), kinds[name])

    def run(self, job: Job) -> None:
        """Change ``job.model`` in place."""
        raise NotImplementedError(f"{type(self).__name__} has no method run(self, job)")

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:  # noqa: ARG002
        """A rough guess of what the step takes, for ``pliant plan``.

        Arguments:
            blocks: number of blocks in the model.
            row: tokens in a row of calibration text.

        Returns:
            Tokens that go through the model (a gradient counts as two more), and whether it holds gradients.
        """
        return 0.0, False

    def to_dict(self) -> dict[str, Any]:
        """The step as plain data, for recipes: its name, its version, and every setting.

        The name of a class that is not part of pliant is ``module:Class``, with a digest of the files that it and what
        its settings name are defined in.
        """
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: _plain(value) for name, value in settings.items()}
        own = {} if (code := self._code()) is None else {"code": code}
        return {"step": name_of(STEPS, type(self)), "version": self.version, **own, **plain}

    def _code(self) -> str | None:
        """A digest of the files that define what is not part of pliant."""
        modules = [type(self).__module__]
        for name, of in settings_of(type(self)).items():
            value = getattr(self, name)
            if of.names is not None and isinstance(value, str):
                modules += value.split(":")[:-1]
            elif of.names is not None:
                modules.append(type(value).__module__)
        return code_digest(modules)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The step with these settings.

        Raises:
            StepError: a setting without a default is missing, or a value is not allowed.
        """
        unset = dataclasses.MISSING
        needed = [f.name for f in dataclasses.fields(cls) if f.default is unset and f.default_factory is unset]
        if missing := [name for name in needed if name not in given]:
            raise StepError(f"{cls.kind} needs a value for {', '.join(missing)}")
        return cls(**given)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. It warns of settings by an earlier name, and of code that has changed.

        Raises:
            StepError: the step was written by a newer pliant, or has a setting that is not known.
        """
        version = raw.get("version", 1)
        if type(version) is not int or version < 1:
            raise StepError(f"the version of {cls.kind} must be a whole number of at least 1; not {version!r}")
        if version > cls.version:
            raise StepError(
                f"{cls.kind} of version {version} was written by a newer pliant; this one knows version {cls.version}"
            )
        given = present_names(
            cls, {name: value for name, value in raw.items() if name not in ("step", "version", "code")}
        )
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        known = settings_of(cls)
        if unknown := sorted(given.keys() - known.keys()):
            raise StepError(f"{cls.kind} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        step = cls.of(given)
        if raw.get("code") not in (None, step._code()):
            warnings.warn(f"{cls.kind}: your code that it uses has changed since the recipe was written", stacklevel=2)
        return step


def _plain(value: Any) -> Any:
    """A setting as plain data."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def step_of(raw: Mapping[str, Any]) -> Step:
    """The step that :meth:`Step.to_dict` wrote as plain data.

    Raises:
        StepError: the data name no step, a setting that the step does not have, or a value that is not allowed.
    """
    kind = raw.get("step") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str):
        raise StepError(f"a step is written as {{'step': 'multipruner', 'ratio': 0.2}}; not {raw!r}")
    return step_class(kind).from_dict(raw)


def step_class(kind: str) -> type[Step]:
    """The class of a step by its name on the command line and in recipes, or by ``module:Class``.

    Raises:
        StepError: no step has this name.
    """
    return find(STEPS, kind, "system", base=Step)


class FormerNameWarning(UserWarning):
    """A setting has the name that it had in an earlier version."""


def present_names(step: type[Step], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their present names. Those that had another name in an earlier version are taken with one warning.

    Raises:
        StepError: a setting is given by both names.
    """
    former = {of.formerly: name for name, of in settings_of(step).items() if of.formerly}
    old = sorted(given.keys() & former.keys())
    if both := [name for name in old if former[name] in given]:
        raise StepError(f"{both[0]} is now {former[both[0]]}, and both are given; leave {both[0]} out")
    if old:
        renamed = ", ".join(f"{name} is now {former[name]}" for name in old)
        warnings.warn(f"{step.kind}: {renamed}", FormerNameWarning, stacklevel=3)
    return {former.get(name, name): value for name, value in given.items()}


def settings_of(step: type[Step]) -> dict[str, Setting]:
    """Name -> setting, for every setting of a step in the order in which they are listed."""
    return {field.name: field.metadata.get("setting", Setting("")) for field in dataclasses.fields(step)}


def paths_of(step: Step) -> list[str]:
    """Files and folders that the settings of a step name."""
    named = [getattr(step, name) for name, of in settings_of(type(step)).items() if of.path]
    return [str(path) for path in named if path]


_types = functools.cache(typing.get_type_hints)


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields of the bases of a class that is not a dataclass yet."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        found |= vars(base).get("__dataclass_fields__", {})
    return found


def recipe_of(step: Step | Iterable[Step]) -> list[Step]:
    """One step, or several in the order in which they are done, as a list.

    Raises:
        StepError: something in it is not a step, or one that packs the model is not the last.
    """
    steps: list[Any] = list(step) if isinstance(step, Iterable) and not isinstance(step, str) else [step]
    for one in steps:
        if not isinstance(one, Step):
            raise StepError(f"a step is expected, such as pliant.MultiPruner(ratio=0.2); not {one!r}")
    for one, after in itertools.pairwise(steps):
        if one.packs:
            raise StepError(
                f"{one.kind} packs the model, and packing comes last; {after.kind} comes after it. Put {one.kind} at "
                "the end"
            )
    return steps


@dataclasses.dataclass
class Job:
    """The model that a step works on, and everything else it may use.

    Attributes:
        model: the model, changed in place.
        tokenizer: gives the model's tokenizer; asked only by steps that read text.
        dense: gives the model as it was before anything was done to it; asked only by steps that learn from it.
        data: calibration text, or None.
        folder: the step's own folder, for what lets it resume; None to keep nothing. It may not exist yet.
        earlier: the same folder of a run whose result is about to be overwritten; read by :meth:`file`.
        progress: where it reports to.
        record: figures that the step wants kept in ``model.pliant_history`` and ``report.json``.
    """

    model: Any
    tokenizer: Callable[[], Any]
    dense: Callable[[], Any]
    data: Any
    folder: Path | None
    progress: Progress
    earlier: Path | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def show(self, *sections: Section, done: str = "", tags: Iterable[str] = ()) -> None:
        """Add to what the report, the card and the command line show of this step.

        Arguments:
            done: what was done to the model, in a few words for the headline.
            tags: tags of the model card.

        Raises:
            StepError: a curve has not as many labels or ys as xs.
        """
        for of in sections:
            if isinstance(of, Curve) and not len(of.xs) == len(of.ys) == len(of.labels):
                raise StepError(
                    f"a curve needs a y and a label for every x; the curve {of.title!r} has {len(of.xs)} xs, "
                    f"{len(of.ys)} ys and {len(of.labels)} labels"
                )
        self.record.setdefault("sections", []).extend(map(to_dict, sections))
        if done:
            self.record["done"] = done
        if tags:
            self.record["tags"] = [*tags]

    def file(self, name: str, belongs: Callable[[Path], Any] = lambda _path: None) -> Path | None:
        """Where the step keeps something in its folder, or None to keep nothing.

        A file of that name of the run that is overwritten is copied there, if nothing is there yet and the file is of
        use.

        Arguments:
            belongs: raises PliantError for a file that is of no use to this step.
        """
        if self.folder is None:
            return None
        path = self.folder / name
        old = None if self.earlier is None else self.earlier / name
        if old is not None and old.exists() and not path.exists():
            with contextlib.suppress(PliantError):
                belongs(old)
                with replacing(path) as aside:
                    shutil.copyfile(old, aside)
        return path
