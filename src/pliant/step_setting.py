"""Setting: the rules and the help text of one setting of a step."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pliant.errors import PliantError, StepError
from pliant.registry import Entry, find

_UNSET: Any = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Setting:
    """The rules and the help text of one setting of a step, besides its type and its default.

    Attributes:
        help: shown by ``pliant ls SYSTEM``.
        at_least, at_most: limits of a number, themselves allowed.
        above, below: limits that are not allowed.
        choices: all allowed values, besides those of ``names``; empty for any.
        names: a table of the registry: one of its names is allowed, and ``module:Name`` of what is not part of pliant.
        path: the value names a file or a folder that the step reads.
        formerly: the name that this setting has in recipes of earlier versions.
        error: raised for a value that is not allowed.
    """

    help: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    names: Mapping[str, Entry] | None = None
    path: bool = False
    formerly: str = ""
    error: type[PliantError] = StepError

    def check(self, name: str, value: Any, kind: Any) -> None:
        """Refuse a value of another type or outside the limits.

        Arguments:
            kind: the annotated type. Types other than numbers, texts, truth values and None are left to the step.

        Raises:
            StepError, or ``error``: the value is not allowed.
        """
        kinds = kinds_of(kind)
        if value is None and type(None) in kinds:
            return
        if self.names is not None and (isinstance(value, str) or kind is str):
            if value not in (*self.choices, *self.names):
                find(self.names, value, name, *self.choices)
            return
        if self.choices:
            if (type(value), value) not in ((type(choice), choice) for choice in self.choices):
                listed = ", ".join(str(choice) for choice in self.choices)
                raise self.error(f"{name} must be one of {listed}; not {value!r}")
            return
        if not {int, float, str, bool}.issuperset(set(kinds) - {type(None)}):
            return
        if isinstance(value, int | float) and not isinstance(value, bool):
            allowed = (float in kinds and math.isfinite(value)) or (int in kinds and isinstance(value, int))
            allowed = allowed and self._within(value)
        else:
            allowed = type(value) in kinds
        if not allowed:
            optional = ", or none" if type(None) in kinds else ""
            raise self.error(f"{name} must be {self._allowed(kinds)}{optional}; not {value!r}")

    def _within(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _allowed(self, kinds: Iterable[Any]) -> str:
        """A description of the allowed values."""
        if str in kinds:
            return "a text"
        if bool in kinds:
            return "true or false"
        number = "a number" if float in kinds else "a whole number"
        if self.at_least is not None and self.at_most is not None:
            return f"{number} from {self.at_least} to {self.at_most}"
        if self.above is not None and self.below is not None:
            return f"{number} between {self.above} and {self.below} (exclusive)"
        limits = {"of at least": self.at_least, "above": self.above, "of at most": self.at_most, "below": self.below}
        return " ".join(
            [number, " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)]
        ).strip()


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or a type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def setting(help: str, *, default: Any = _UNSET, factory: Any = _UNSET, **limits: Any) -> Any:
    """A setting of a step, as a dataclass field.

    Arguments:
        help: one or two sentences for ``pliant ls SYSTEM``.
        default: left out for a setting that must be given.
        factory: makes the default, for values that can change.
        limits: ``at_least``, ``at_most``, ``above``, ``below``, ``choices``, ``names``, ``path``, ``formerly`` and
            ``error`` of :class:`Setting`.
    """
    metadata = {"setting": Setting(help, **limits)}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)
