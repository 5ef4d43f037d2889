"""Score sub-networks by examples of their own: the whole active model is measured each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pliant.anatomy import Anatomy
from pliant.elastic import Elastic, Subnet
from pliant.measure.scores import Score


class ModelScorer:
    """Scores sub-networks by a score that has its own examples or generates; used like a
    :class:`pliant.measure.prefix_scorer.PrefixScorer`, and shares nothing among sub-networks.

    Arguments:
        tokenizer: gives the model's tokenizer.
        elastic: that of another scorer of the same model, when the two are used in turn.

    Attributes:
        tokens: None; the score decides how much goes into one forward pass.
        evaluations: scores computed so far.
        block_forwards: residual blocks run so far, in passes over all examples.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        score: Score,
        tokenizer: Callable[[], Any],
        elastic: Elastic | None = None,
    ):
        self.model, self.anatomy, self.metric, self.tokenizer = model.eval(), anatomy, score, tokenizer
        self.elastic = elastic or Elastic(model, anatomy)
        self.tokens: int | None = None
        self.evaluations = 0
        self.block_forwards = 0.0

    def rebase(self, subnet: Subnet) -> None:
        """Does nothing: no prefix is remembered."""

    def score(self, subnet: Subnet) -> float:
        """The loss of ``subnet``: its mean score over the examples, of which less is better."""
        self.elastic.activate(subnet)
        total, count = self.metric.measure(self.model, self.tokenizer())
        self.block_forwards += len(self.anatomy.blocks) - len(subnet.skip)
        self.evaluations += 1
        return self.metric.loss(total / count)

    def close(self) -> None:
        """Put the model back as it was."""
        self.elastic.activate(Subnet())
