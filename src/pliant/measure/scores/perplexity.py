"""Perplexity of the calibration text."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from pliant.forward.losses import nll_sum
from pliant.measure.scores.score import Score


class Perplexity(Score):
    """Mean negative log-likelihood of the next token, in nats; shown as its exponential, the perplexity."""

    label: ClassVar[str] = "calibration perplexity"

    def batch(
        self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
    ) -> tuple[float, int]:
        del reference
        return nll_sum(logits, targets).sum().item(), targets.numel()

    def shown(self, loss: float) -> float:
        return math.exp(min(loss, 700))  # the exponential of more overflows
