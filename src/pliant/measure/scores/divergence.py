"""Divergence of the model's predictions from those of the dense model."""

from __future__ import annotations

from typing import ClassVar

import torch

from pliant.forward.losses import kl_sum
from pliant.measure.scores.score import Score


class Divergence(Score):
    """Kullback-Leibler divergence of the next-token distribution from that of the dense model, in nats per token."""

    label: ClassVar[str] = "KL to dense"
    needs_reference: ClassVar[bool] = True
    logits_copies: ClassVar[int] = 2

    def batch(
        self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
    ) -> tuple[float, int]:
        del targets
        assert reference is not None
        return kl_sum(logits, reference).sum().item(), logits.shape[0] * logits.shape[1]
