"""The kinds of questions: choose between continuations, answer freely, or predict a given continuation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from pliant.digest import json_digest

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # the minus of 10-3 is not a sign
_LETTER = re.compile(r"\b[A-J]\b")
_STATED = re.compile(r"(?i:answer(?: is|:))\W*([A-J])\b|^\W*([A-J])[.):]")  # "the answer is (B)", "B. Because"
_CLOSE = 1e-3  # reference answers are rounded by hand


@dataclass(frozen=True)
class Question:
    """A context, the continuations to choose from, and which one is right (counted from 0).

    A tuple of contexts has one for every choice: then the choices may all be the same continuation, and the question is
    after which context it is likeliest.
    """

    context: str | tuple[str, ...]
    choices: tuple[str, ...]
    answer: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The context and the continuation of every choice."""
        contexts = [self.context] * len(self.choices) if isinstance(self.context, str) else self.context
        return list(zip(contexts, self.choices, strict=True))


@dataclass(frozen=True)
class OpenQuestion:
    """A prompt and its reference answer: a number, a letter, or any other text."""

    context: str
    answer: str

    def matches(self, written: str) -> bool:
        """Whether ``written`` gives the answer.

        A number is compared with the last number in ``written``, within 0.001. A letter is compared with the letter
        that is stated as the answer or begins the text, else with the last capital A to J that stands alone. Any other
        answer is compared with the first line, ignoring case and a full stop at the end.
        """
        reference = self.answer.strip()
        if _NUMBER.fullmatch(reference):
            numbers = _NUMBER.findall(written)
            return bool(numbers) and abs(_value(numbers[-1]) - _value(reference)) <= _CLOSE
        if _LETTER.fullmatch(reference):
            stated = _STATED.search(written)
            return ([stated[1] or stated[2]] if stated else _LETTER.findall(written)[-1:]) == [reference]
        return _plain(written) == _plain(reference)


@dataclass(frozen=True)
class Continuation:
    """A context and the text that follows it, such as the last word of a passage (LAMBADA)."""

    context: str
    continuation: str


def questions_digest(items: Sequence[Question | OpenQuestion | Continuation]) -> str:
    """Hash of the questions: results with the same hash can be compared."""
    return json_digest([astuple(item) for item in items])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _plain(answer: str) -> str:
    first, *_ = answer.strip().splitlines() or [""]
    return first.strip().removesuffix(".").casefold()
