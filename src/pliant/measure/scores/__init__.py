"""Scores: the numbers by which a search compares models, one file for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pliant.errors import StepError, WeightError
from pliant.measure.scores.score import Score
from pliant.registry import SCORES, find


def score_of(metric: str | Mapping[str, Any] | Score) -> Score:
    """A score by its name, or by what :meth:`Score.plain` wrote; a score object is returned as it is.

    Raises:
        StepError: the name is not known, or a setting is not.
    """
    if isinstance(metric, Score):
        return metric
    settings = {"score": metric, **(metric if isinstance(metric, Mapping) else {})}
    name = settings.pop("score")
    if "key" in settings:
        raise StepError(
            f"the score {name} was made in Python from data that a recipe does not hold. Apply the step in Python, or "
            "give another metric"
        )
    kind = find(SCORES, name, "metric", base=Score)
    try:
        return kind(**settings)
    except TypeError as error:
        raise StepError(f"cannot make the score {name} with the settings {settings}: {error}") from error


def loss_of(score: Score, total: Any, count: Any) -> float:
    """The loss of a model from the sums that a score returned; a tensor of one element counts as its number.

    Raises:
        WeightError: nothing was counted.
    """
    if not count > 0:
        raise WeightError(
            f"the score {score.name} counted {count} things; it must return a sum and how many were summed up"
        )
    return score.loss(float(total) / float(count))


__all__ = ["Score", "loss_of", "score_of"]
