"""What a model is scored by, one file for each score."""

from __future__ import annotations

from pliant.errors import DataError
from pliant.measure.scores.divergence import Divergence
from pliant.measure.scores.perplexity import Perplexity
from pliant.measure.scores.score import Score

SCORES: dict[str, type[Score]] = {score.name: score for score in (Perplexity, Divergence)}
"""Scores that need nothing but the calibration text, and so can be given by name."""


def score_of(metric: str | Score) -> Score:
    """A score by its name; a score object is returned as it is.

    Raises:
        DataError: the name is not known.
    """
    if isinstance(metric, Score):
        return metric
    if metric not in SCORES:
        raise DataError(f"metric must be one of {', '.join(SCORES)}, or a Score; not {metric!r}")
    return SCORES[metric]()


__all__ = ["SCORES", "Divergence", "Perplexity", "Score", "score_of"]
