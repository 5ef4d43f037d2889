"""Questions from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pliant.data.question_files.kinds import Continuation, OpenQuestion, Question
from pliant.data.question_files.row_formats import form_of
from pliant.data.text import json_objects, read
from pliant.errors import DataError


def questions(path: str | Path, limit: int | None = None) -> list[Question] | list[OpenQuestion] | list[Continuation]:
    """Questions from a ``.jsonl`` or ``.json`` file, optionally gzipped (``.gz``).

    A row is ``{"context": "...", "choices": ["...", "..."], "answer": 1}``. The context may also be called
    ``question``, ``query`` or ``prompt``, the answer ``label`` or ``gold``. Choices are continuations: a space is
    inserted if neither the context ends with white space nor the choice starts with it.

    Rows of the well-known data sets are recognised by their keys and posed as lm-eval poses them; see
    :data:`pliant.data.question_files.row_formats.FORMS`.

    Arguments:
        limit: maximum number of rows, from the first.

    Returns:
        :class:`Question` for rows with choices, :class:`OpenQuestion` for rows with only an answer,
        :class:`Continuation` for rows with ``context`` and ``continuation``.

    Raises:
        DataError: missing file, missing key, fewer than two choices, an answer that is none of them, or rows of several
            kinds; the message names the row.
    """
    path = Path(path).expanduser()
    if limit is not None and limit < 1:
        raise DataError(f"the limit of questions must be at least 1; not {limit}")
    items: list[Any] = []
    for number, row in enumerate(json_objects(read(path), path)[:limit], 1):
        try:
            items.append(form_of(row, path).pose(row))
            if type(items[-1]) is not type(items[0]):
                raise DataError(
                    "some rows of this file give choices, others only an answer or a continuation; these are "
                    "measured differently, so put them into separate files"
                )
        except DataError as error:
            raise DataError(f"{str(path)!r}, row {number}: {error}") from None
    return items
