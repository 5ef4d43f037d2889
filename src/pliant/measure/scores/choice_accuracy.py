"""Accuracy on multiple-choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pliant.data import Question
from pliant.data.question_files.kinds import questions_digest
from pliant.errors import DataError
from pliant.measure.quality.multiple_choice import choose
from pliant.measure.scores.score import Score


class ChoiceAccuracy(Score):
    """Share of questions whose likeliest choice is the right one.

    Arguments:
        questions: from :func:`pliant.questions`, or ``Question`` objects.
        per_character: divide the log-likelihood of a choice by its length first (``acc_norm``).
    """

    name: ClassVar[str] = "choice_accuracy"
    label: ClassVar[str] = "questions answered correctly"
    lower_is_better: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __init__(self, questions: Sequence[Question], *, per_character: bool = False):
        if not questions:
            raise DataError("choice accuracy needs at least one question")
        self.questions, self.figure = list(questions), "acc_norm" if per_character else "acc"

    @property
    def key(self) -> str:
        return f"{self.name}:{self.figure}:{questions_digest(self.questions)}"

    def measure(self, model: Any, tokenizer: Any) -> tuple[float, int]:
        right = choose(model, tokenizer, self.name, self.questions)[self.figure]
        return sum(right), len(right)
