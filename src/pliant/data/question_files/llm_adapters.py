"""Rows of the LLM-Adapters files: one text holds the question, its choices and the form of the answer."""

from __future__ import annotations

import re
from typing import Any

from pliant.data.question_files.builders import ASKED, ask, fill, string
from pliant.data.question_files.kinds import OpenQuestion, Question
from pliant.errors import DataError

_CHOICE = re.compile(r"(answer|solution|ending|option)(\d+)")


def ask_instruction(row: dict[str, Any], asked: str = ASKED) -> Question | OpenQuestion:
    """``{"instruction": "Please choose …: QUESTION Answer1: … Answer2: … Answer format: …", "answer": "answer2"}``.

    Choices are scored as full texts. Questions to be answered with true or false get ``no`` and ``yes``. A row whose
    answer is neither is an open question.

    Arguments:
        asked: template of the question, which depends on the data set; rows of different data sets look the same.

    Raises:
        DataError: the choices cannot be separated, or the answer is empty.
    """
    answer = string(row, "answer").strip()
    whole = string(row, "instruction")
    if row.get("input"):
        whole = f"{whole.rstrip()}\n{string(row, 'input')}"
    body = whole.rpartition("Answer format:")[0].partition(": ")[2].strip()  # after "Please choose … question: "
    if answer in ("false", "true") and body:
        return ask(ASKED.format(body), ("no", "yes"), ("false", "true").index(answer))
    chosen = _CHOICE.fullmatch(answer)
    if not chosen:
        if not answer:
            raise DataError("the answer is empty")
        return OpenQuestion(ASKED.format(whole.strip()), answer)
    word, number = chosen[1].capitalize(), int(chosen[2])
    question, *choices = (part.strip() for part in re.split(rf"\b{word}\d+:", body))
    if not question or not 1 <= number <= len(choices):
        raise DataError(
            f"the answer is {answer!r}, but the instruction lists {len(choices)} choice(s); it must read 'Please "
            f"choose …: question {word}1: … {word}2: … Answer format: …'"
        )
    if word == "Option":
        return fill(question, choices, number - 1)
    return ask(question if word == "Ending" else asked.format(question), choices, number - 1)
