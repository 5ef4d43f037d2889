"""What can go wrong in training."""

from pliant.errors import PliantError


class ResumeError(PliantError, ValueError):
    """What an interrupted training left on disk belongs to another one, or is damaged."""


class DivergedError(PliantError, ArithmeticError):
    """The loss is no longer a number."""
