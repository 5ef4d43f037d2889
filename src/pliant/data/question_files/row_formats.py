"""Row formats of question files; each is posed as in lm-eval, so that results can be compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pliant.data.question_files.builders import ASKED, ask, check, fill, key_in, label_index, string, strings
from pliant.data.question_files.kinds import Continuation, OpenQuestion, Question
from pliant.data.question_files.llm_adapters import ask_instruction
from pliant.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One form of row.

    Attributes:
        name: its usual name.
        keys: keys of such a row, ``one/or/another`` if names differ.
        pose: makes a question from a row, or raises DataError.
        named: text that the name of the file or its folder must contain, because rows of another data set look the
            same.
    """

    name: str
    keys: tuple[str, ...]
    pose: Callable[[Row], Question | OpenQuestion | Continuation]
    named: str = ""


def form_of(row: Row, path: Path) -> Form:
    """The first of :data:`FORMS` whose keys a row has.

    Raises:
        DataError: no form fits; the message names the missing key of the plain form.
    """
    where = "/".join(path.resolve().parts[-2:]).lower()
    for form in FORMS:
        if form.named in where and all(key_in(row, names) for names in form.keys):
            return form
    lacking = next(names for names in PLAIN if not key_in(row, names))
    known = ", ".join(dict.fromkeys(form.name for form in FORMS))
    raise DataError(
        f"no key {' or '.join(map(repr, lacking.split('/')))}; it has {', '.join(row)}. Known forms: {known}"
    )


def _arc(row: Row) -> Question:
    return ask(ASKED.format(string(row, "question")), *_labelled(row))


def _openbookqa(row: Row) -> Question:
    return ask(string(row, "question_stem"), *_labelled(row))


def _labelled(row: Row) -> tuple[list[str], int]:
    """The texts of ``{"text": [...], "label": ["A", ...]}`` and the index of ``answerKey`` among the labels."""
    choices = row["choices"]
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise DataError(f'the choices must be {{"text": [...], "label": [...]}}; they are {choices!r}')
    texts, labels = strings(choices, "text"), strings(choices, "label")
    check(texts)
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} choices have {len(labels)} labels; each needs one")
    return texts, label_index(row, "answerKey", labels)


def _piqa(row: Row) -> Question:
    choices = [string(row, "sol1"), string(row, "sol2")]
    return ask(ASKED.format(string(row, "goal")), choices, label_index(row, "label", "01"))


def _hellaswag(row: Row) -> Question:
    if key_in(row, "ctx_a") and key_in(row, "ctx_b"):
        context = f"{string(row, 'ctx_a')} {string(row, 'ctx_b').capitalize()}"
    else:
        context = string(row, "ctx")
    endings = [_without_marks(ending) for ending in strings(row, "endings")]
    check(endings)
    return ask(
        _without_marks(f"{string(row, 'activity_label')}: {context}"),
        endings,
        label_index(row, "label", _counted(endings)),
    )


def _without_marks(text: str) -> str:
    """The text without section marks in brackets, which rows from WikiHow have."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Row) -> Question:
    options = [string(row, "option1"), string(row, "option2")]
    return fill(string(row, "sentence"), options, label_index(row, "answer", "12"))


def _boolq(row: Row) -> Question:
    question = string(row, "question").rstrip("?") + "?"  # some copies of the data set lack the question mark
    answer = "label" if "label" in row else "answer"
    return ask(f"{string(row, 'passage')}\n{ASKED.format(question)}", ("no", "yes"), label_index(row, answer, "01"))


def _siqa(row: Row) -> Question:
    context = f"Q: {string(row, 'context')} {string(row, 'question')}\nA:"
    return ask(context, [string(row, f"answer{letter}") for letter in "ABC"], label_index(row, "label", "123"))


def _mmlu(row: Row) -> Question:
    choices = strings(row, "choices")
    check(choices)
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    subject = string(row, "subject").replace("_", " ")
    context = (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{string(row, 'question').strip()}\n{listed}\nAnswer:"
    )
    return ask(context, letters, label_index(row, "answer", _counted(choices)))


def _counted(choices: list[str]) -> list[str]:
    return [str(number) for number in range(len(choices))]


def _plain(row: Row) -> Question:
    context, choices, answer = (row[key_in(row, names) or ""] for names in PLAIN)
    if not isinstance(context, str) or not isinstance(choices, list) or any(not isinstance(c, str) for c in choices):
        raise DataError("the context must be a string and the choices a list of strings")
    check(choices)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"the answer must be 0 to {len(choices) - 1}, the index of the right choice; it is {answer!r}")
    space = "" if not context or context[-1].isspace() else " "
    return Question(context, tuple(c if c[0].isspace() else space + c for c in choices), answer)


def _answered(row: Row) -> OpenQuestion:
    """The answer follows ``####`` if the row has that mark; the text before it is the reasoning."""
    answer = string(row, "answer").rpartition("####")[2].strip()
    if not answer:
        raise DataError("the answer is empty")
    return OpenQuestion(ASKED.format(string(row, "question").strip()), answer)


def _mawps(row: Row) -> OpenQuestion:
    try:
        answer = float(row["ans"])  # some rows have it as a string
    except (TypeError, ValueError):
        raise DataError(f"'ans' must be a number; it is {row['ans']!r}") from None
    return OpenQuestion(ASKED.format(string(row, "original_text").strip()), str(answer))


def _continued(row: Row) -> Continuation:
    context, continuation = string(row, "context"), string(row, "continuation")
    if not continuation.strip():
        raise DataError("the continuation is empty")
    space = "" if context[-1:].isspace() or continuation[0].isspace() else " "
    return Continuation(context, space + continuation)


PLAIN = ("context/question/query/prompt", "choices", "answer/label/gold")
_INSTRUCTED = ("instruction", "answer")
FORMS = (
    Form("llm-adapters", _INSTRUCTED, partial(ask_instruction, asked="{}"), named="openbookqa"),
    Form("llm-adapters", _INSTRUCTED, partial(ask_instruction, asked="Q: {}\nA:"), named="social_i_qa"),
    Form("llm-adapters", _INSTRUCTED, ask_instruction),
    Form("ARC", ("question", "choices", "answerKey"), _arc),
    Form("OpenBookQA", ("question_stem", "choices", "answerKey"), _openbookqa),
    Form("PIQA", ("goal", "sol1", "sol2", "label"), _piqa),
    Form("HellaSwag", ("activity_label", "ctx_a/ctx", "endings", "label"), _hellaswag),
    Form("WinoGrande", ("sentence", "option1", "option2", "answer"), _winogrande),
    Form("BoolQ", ("passage", "question", "label/answer"), _boolq),
    Form("SIQA", ("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
    Form("MMLU", ("subject", "question", "choices", "answer"), _mmlu),
    Form("MAWPS", ("original_text", "equation", "ans"), _mawps),
    Form("plain", PLAIN, _plain),
    Form("continuation", ("context", "continuation"), _continued),
    Form("question and answer", ("question", "answer"), _answered),
)
