"""Step: one thing that is done to a model, as one config dataclass. A recipe is a list of steps."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from pliant.errors import PliantError
from pliant.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Base of every step. A subclass adds its settings as fields; the docstring under a field is its help text.

    ``pliant.apply(model, step, data)`` calls :meth:`run` with the job at hand.
    """

    kind: ClassVar[str] = ""
    """Name of the step in recipes and on the command line."""

    trains: ClassVar[bool] = False
    """Whether it trains the model, for which all weights have to be in memory."""

    reshapes: ClassVar[bool] = True
    """Whether it changes what tensors a model has; if not, the model's config stays as it is."""

    packs: ClassVar[bool] = False
    """Whether it packs the model, after which no other step can follow."""

    def run(self, job: Job) -> None:
        """Change ``job.model`` in place."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The step as plain data, for recipes: its kind and every setting."""
        return {"step": self.kind, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}


class StepError(PliantError, ValueError):
    """A setting of a step is outside what it can be."""


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
                f"{one.kind} packs the model, and packing comes last; {after.kind} comes after it. Put {one.kind} at the end"
            )
    return steps


def is_number(value: object) -> bool:
    """Whether a setting is a number; True and False, which Python counts among them, are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_seed(seed: object) -> None:
    """Refuse a seed that a generator would not take.

    Raises:
        StepError: it is not a whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise StepError(f"seed is a whole number from 0 to {2**63 - 1}, not {seed!r}")


def help_texts(step: type[Step]) -> dict[str, str]:
    """The help text of every setting, from the docstring under the field; base classes included."""
    texts: dict[str, str] = {}
    for cls in reversed(step.__mro__):
        if not dataclasses.is_dataclass(cls) or cls is Step:
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(cls))
        for name, text in re.findall(r'^ {4}(\w+): [^\n]+\n {4}"""(.*?)"""', source, flags=re.S | re.M):
            texts[name] = " ".join(text.split())
    return texts


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass
class Job:
    """What a step works on.

    Attributes:
        model: the model, changed in place.
        tokenizer: gives the model's tokenizer; asked only by steps that read text.
        dense: gives the model as it was before anything was done to it; asked only by steps that learn from it.
        data: calibration text, or None.
        work: folder where the step keeps what lets it resume, or None to keep nothing.
        progress: where it reports to.
        record: what the step wants remembered in the report.
    """

    model: Any
    tokenizer: Callable[[], Any]
    dense: Callable[[], Any]
    data: Any
    work: Path | None
    progress: Progress
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def place(self, name: str, key: str) -> Path | None:
        """Where in the work folder a step keeps something. What is done to a model twice has a place each: ``search.jsonl``,
        then ``search-2.jsonl``.

        Arguments:
            key: what the records of steps have that keep such a thing.
        """
        if self.work is None:
            return None
        before = sum(key in record for record in getattr(self.model, "pliant_history", []))
        path = self.work / name
        return path.with_stem(f"{path.stem}-{before + 1}") if before else path
