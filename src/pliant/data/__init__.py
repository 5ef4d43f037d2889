"""Text, questions and training examples."""

from pliant.data.choice import questions
from pliant.data.examples import Examples, examples
from pliant.data.question import Continuation, OpenQuestion, Question
from pliant.data.text import Text, text

__all__ = ["Continuation", "Examples", "OpenQuestion", "Question", "Text", "examples", "questions", "text"]
