"""Text, questions and training examples."""

from pliant.data.examples import Examples, examples
from pliant.data.question_files.kinds import Continuation, OpenQuestion, Question
from pliant.data.question_files.reader import questions
from pliant.data.text import Text, text

__all__ = ["Continuation", "Examples", "OpenQuestion", "Question", "Text", "examples", "questions", "text"]
