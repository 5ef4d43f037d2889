"""Multiple-choice questions from local JSONL files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.data.text import json_objects, read
from pliant.errors import DataError


@dataclass(frozen=True)
class Question:
    """A context, the continuations to choose from, and which one is right (counted from 0)."""

    context: str
    choices: tuple[str, ...]
    answer: int


def questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Questions from a ``.jsonl`` or ``.json`` file.

    A row is ``{"context": "...", "choices": ["...", "..."], "answer": 1}``. ``question``, ``query`` or ``prompt`` may
    stand for ``context``, ``label`` or ``gold`` for ``answer``. Choices are continuations: a space is put before one
    that does not start with white space when the context does not end with it.

    Raises:
        DataError: missing file, missing key, fewer than two choices, or an answer that is no choice; with the row.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} questions leaves nothing to measure; it must be at least 1")
    rows = json_objects(read(path), path)[:limit]
    return [_question(row, f"{str(path)!r}, row {number}") for number, row in enumerate(rows, 1)]


def _question(row: dict[str, Any], where: str) -> Question:
    context = _first(row, ("context", "question", "query", "prompt"), where)
    choices = _first(row, ("choices",), where)
    answer = _first(row, ("answer", "label", "gold"), where)
    if not isinstance(context, str) or not isinstance(choices, list) or any(not isinstance(c, str) for c in choices):
        raise DataError(f"{where}: the context must be a string and the choices a list of strings")
    if len(choices) < 2:
        raise DataError(f"{where}: {len(choices)} choice(s); at least 2 are needed")
    if any(not choice.strip() for choice in choices):
        raise DataError(f"{where}: an empty choice cannot be scored")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: the answer must be 0 to {len(choices) - 1}, the place of the right choice; it is {answer!r}"
        )
    space = "" if not context or context[-1].isspace() else " "
    return Question(context, tuple(c if c[0].isspace() else space + c for c in choices), answer)


def _first(row: dict[str, Any], keys: Sequence[str], where: str) -> Any:
    for key in keys:
        if key in row:
            return row[key]
    raise DataError(f"{where}: no key {' or '.join(map(repr, keys))}; it has {', '.join(row)}")
