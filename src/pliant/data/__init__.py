"""Text and questions from local files."""

from pliant.data.choice import Question, questions
from pliant.data.text import Text, text

__all__ = ["Question", "Text", "questions", "text"]
