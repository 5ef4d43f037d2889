"""Share of open questions that the model answers correctly by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pliant.data import OpenQuestion
from pliant.data.question_files.kinds import questions_digest
from pliant.errors import DataError
from pliant.measure.quality.generated_answers import answer
from pliant.measure.scores.score import Score


class AnswerMatch(Score):
    """Share of open questions whose greedily generated answer matches.

    Arguments:
        questions: from :func:`pliant.questions`, or ``OpenQuestion`` objects.
        max_new_tokens: maximum length of an answer.
    """

    name: ClassVar[str] = "answer_match"
    label: ClassVar[str] = "generated answers that match"
    lower_is_better: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    generates: ClassVar[bool] = True

    def __init__(self, questions: Sequence[OpenQuestion], *, max_new_tokens: int = 256):
        if not questions:
            raise DataError("answer match needs at least one question")
        self.questions, self.max_new_tokens = list(questions), max_new_tokens

    @property
    def key(self) -> str:
        return f"{self.name}:{self.max_new_tokens}:{questions_digest(self.questions)}"

    def measure(self, model: Any, tokenizer: Any) -> tuple[float, int]:
        right = answer(model, tokenizer, self.name, self.questions, self.max_new_tokens)["match"]
        return sum(right), len(right)
