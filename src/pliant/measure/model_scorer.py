"""Score sub-networks by scores that have their own examples: the whole model runs each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pliant.anatomy import Anatomy
from pliant.elastic import Elastic, Subnet
from pliant.measure.scores import Score, loss_of


class ModelScorer:
    """Scores sub-networks by a score that has its own examples or generates. It is used like a
    :class:`pliant.measure.prefix_scorer.PrefixScorer`, but re-uses no hidden states.

    Arguments:
        tokenizer: returns the model's tokenizer.
        elastic: that of another scorer of the same model, if the two are used in turn.

    Attributes:
        tokens: None; the score chooses the size of a forward pass.
        evaluations: number of scores computed so far.
        block_forwards: number of residual blocks run so far, in passes over all examples.
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
        """Does nothing: there are no prefixes to re-use."""

    def score(self, subnet: Subnet) -> float:
        """The loss of ``subnet``: its mean score over the examples, negated if higher is better."""
        self.elastic.activate(subnet)
        total, count = self.metric.measure(self.model, self.tokenizer())
        self.block_forwards += len(self.anatomy.alive(subnet.skip))
        self.evaluations += 1
        return loss_of(self.metric, total, count)

    def close(self) -> None:
        """Restore the dense model."""
        self.elastic.activate(Subnet())
