"""Losses of a batch of windows, one number per window. Lower is better."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pliant.device import total

TOKENS_AT_A_TIME = 64  # whose losses are computed together


def nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window's tokens given those before them; perplexity is its exponential.

    Arguments:
        logits: shape ``(windows, seqlen, vocabulary)``.
        ids: shape ``(windows, seqlen)``.

    Returns:
        Nats per token, float64, shape ``(windows,)``; on the CPU if the device of the logits has no float64.
    """
    return nll_sum(logits, ids[:, 1:]) / (ids.shape[1] - 1)


def nll_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the first tokens of each window, summed.

    Arguments:
        logits: shape ``(windows, tokens, vocabulary)``.
        targets: the token after each of them if there is one, shape ``(windows, tokens or fewer)``.

    Returns:
        Nats, float64, shape ``(windows,)``.
    """

    def each(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return total(F.cross_entropy(part.float(), target, reduction="none"))

    return _by_window(each, logits[:, : targets.shape[1]], targets)


def kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the next-token distributions from those of ``reference``, in nats per token.

    Both arguments have shape ``(windows, seqlen, vocabulary)``; the result is float64 of shape ``(windows,)``.
    """
    return kl_sum(logits, reference) / logits.shape[1]


def kl_sum(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """:func:`kl`, summed over the tokens of each window."""

    def each(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        return total(theirs.exp() * (theirs - ours))

    return _by_window(each, logits, reference)


def _by_window(
    each: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Sum over the tokens of each window, a stretch at a time, so that temporary copies of the logits stay small."""
    pairs = zip(first, second, strict=True)
    stretches = (zip(a.split(TOKENS_AT_A_TIME), b.split(TOKENS_AT_A_TIME), strict=True) for a, b in pairs)
    return torch.stack([torch.stack([each(a, b) for a, b in window]).sum() for window in stretches])
