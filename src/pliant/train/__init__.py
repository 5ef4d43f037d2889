"""Training that follows a cut."""

from pliant.errors import DivergedError, ResumeError
from pliant.train.recover import Recover

__all__ = ["DivergedError", "Recover", "ResumeError"]
