"""Building blocks of row formats: checked values of a row, and questions made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pliant.data.question_files.kinds import Question
from pliant.errors import DataError

ASKED = "Question: {}\nAnswer:"


def key_in(row: dict[str, Any], names: str) -> str | None:
    """The first of ``"one/or/another"`` that the row has."""
    return next((name for name in names.split("/") if name in row), None)


def string(row: dict[str, Any], key: str) -> str:
    """A value that must be a string."""
    if not isinstance(row[key], str):
        raise DataError(f"{key!r} must be a string; it is {row[key]!r}")
    return row[key]


def strings(row: dict[str, Any], key: str) -> list[str]:
    """A value that must be a list of strings."""
    if not isinstance(row[key], list) or any(not isinstance(item, str) for item in row[key]):
        raise DataError(f"{key!r} must be a list of strings; it is {row[key]!r}")
    return row[key]


def label_index(row: dict[str, Any], key: str, labels: Sequence[str]) -> int:
    """The index of a value among the labels; data sets write the same label as a string, a number or a boolean."""
    value, known = row[key], list(labels)
    label = str(int(value) if isinstance(value, bool) else value).strip()
    if label not in known:
        raise DataError(
            f"{key!r} must be {', '.join(known[:-1])} or {known[-1]}; it is {value!r}. Splits without public answers "
            "cannot be measured"
        )
    return known.index(label)


def ask(context: str | tuple[str, ...], choices: Sequence[str], answer: int) -> Question:
    """A question whose choices follow the context after a space, as in lm-eval."""
    check(choices)
    return Question(context, tuple(f" {choice}" for choice in choices), answer)


def fill(sentence: str, options: Sequence[str], answer: int) -> Question:
    """A sentence with ``_`` in it: after which option is the rest of the sentence likeliest?"""
    before, gap, after = sentence.partition("_")
    if not gap or not after.strip():
        raise DataError(f"the sentence must have a _ to fill and text after it; it is {sentence!r}")
    check(options)
    return ask(tuple(before + option for option in options), [after.strip()] * len(options), answer)


def check(choices: Sequence[str]) -> None:
    """Refuse fewer than two choices, and empty ones."""
    if len(choices) < 2:
        raise DataError(f"{len(choices)} choice(s); at least 2 are needed")
    if any(not choice.strip() for choice in choices):
        raise DataError("an empty choice cannot be scored")
