"""Losses of a batch of windows, one number a window. Lower is better."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window's tokens given those before them; perplexity is its exponential.

    Arguments:
        logits: shape ``(windows, seqlen, vocabulary)``.
        ids: shape ``(windows, seqlen)``.

    Returns:
        Nats per token, float64, shape ``(windows,)``.
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1).double().mean(1)


def kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the next-token distributions from those of ``reference``, in nats per token.

    Both arguments have shape ``(windows, seqlen, vocabulary)``; the result is float64 of shape ``(windows,)``.
    """
    ours, theirs = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64).mean(1)


METRICS = ("perplexity", "kl")
