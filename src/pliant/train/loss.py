"""The loss of a batch and its gradients, with logits of only a few tokens in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pliant.data.tokenize_examples import IGNORED
from pliant.device import to_float64, total
from pliant.train.trunk_and_head import Halves


def logits_at_once(device: torch.device) -> int:
    """The number of tokens whose logits are in memory at a time.

    On a CPU they are so few that the allocator reuses their memory, instead of asking the system for pages to be
    cleared.
    """
    return 64 if device.type == "cpu" else 1024


@dataclass(frozen=True)
class Distillation:
    """Learn next-token distributions from a teacher, besides the tokens of the text.

    Attributes:
        teacher: the dense model.
        weight: 0 learns from the text alone, 1 from the teacher alone.
        temperature: of both distributions; the gradients are scaled back to their usual size.
    """

    teacher: Halves
    weight: float
    temperature: float


def backward(
    halves: Halves,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    distillation: Distillation | None = None,
) -> torch.Tensor:
    """Compute the loss of a batch, and add its gradients to those of the parameters.

    The loss is the sum over predicted tokens, not their mean: it does not depend on how a step is split into batches,
    and its gradients are large enough for float16.

    Arguments:
        batch: ids, labels and mask, from :meth:`pliant.data.tokenize_examples.Encoded.batch`.

    Returns:
        The loss in nats, summed over the learned tokens, a float64 tensor.
    """
    ids, labels, mask = batch
    learned = labels[:, 1:] != IGNORED
    hidden = halves.trunk(ids, mask)[:, :-1][learned]
    theirs = None
    if distillation is not None:
        with torch.no_grad():  # not inference_mode: gradients are made of these, and those are added to in place
            theirs = distillation.teacher.trunk(ids, mask)[:, :-1][learned]
    leaf = hidden.detach().requires_grad_()
    summed: Any = 0.0
    targets = labels[:, 1:][learned]
    for chunk in _chunks(targets):
        logits = halves.head(leaf[chunk])
        value, gradient = _loss(
            logits.detach(), targets[chunk], None if theirs is None else theirs[chunk], distillation
        )
        logits.backward(gradient)
        summed = summed + value
    if leaf.grad is not None:
        hidden.backward(leaf.grad)
    return torch.as_tensor(summed, dtype=torch.float64)


def _loss(
    logits: torch.Tensor, targets: torch.Tensor, theirs: torch.Tensor | None, distillation: Distillation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of some tokens and its gradient with respect to their logits.

    Both are written out, because the gradient of either part is a difference of probabilities: autograd would keep
    several more tensors of the size of the logits, which are the largest.

    Arguments:
        logits: shape ``(tokens, vocabulary)``.
        theirs: the teacher's final hidden states, shape ``(tokens, hidden)``.
    """
    raw, rows = logits.float(), torch.arange(len(targets), device=targets.device)
    ours = raw.log_softmax(-1)
    value = -total(ours[rows, targets])
    if distillation is None or theirs is None:
        gradient = ours.exp_()
        gradient[rows, targets] -= 1
        return value, gradient.to(logits.dtype)
    weight, temperature = distillation.weight, distillation.temperature
    with torch.no_grad():
        expected = distillation.teacher.head(theirs).float().div_(temperature).log_softmax(-1)
    flat = ours if temperature == 1 else (raw / temperature).log_softmax(-1)
    wanted = expected.exp()
    divergence = torch.dot(wanted.view(-1), expected.sub_(flat).view(-1))
    # the divergence goes with 1 / temperature**2, so it and its gradient are scaled back by as much
    value = (1 - weight) * value + weight * temperature**2 * to_float64(divergence)
    gradient = flat.exp().sub_(wanted).mul_(weight * temperature)
    if weight < 1:
        gradient.add_(ours.exp_(), alpha=1 - weight)
        gradient[rows, targets] -= 1 - weight
    return value, gradient.to(logits.dtype)


def _chunks(targets: torch.Tensor) -> list[slice]:
    count = logits_at_once(targets.device)
    return [slice(start, start + count) for start in range(0, len(targets), count)]


@torch.no_grad()
def held_out_loss(halves: Halves, batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """Mean cross-entropy of the learned tokens in nats per token; perplexity is its exponential."""
    loss, tokens = 0.0, 0
    for ids, labels, mask in batches:
        learned = labels[:, 1:] != IGNORED
        hidden, targets = halves.trunk(ids, mask)[:, :-1][learned], labels[:, 1:][learned]
        for chunk in _chunks(targets):
            logits = halves.head(hidden[chunk]).float()
            loss += F.cross_entropy(logits, targets[chunk], reduction="sum").item()
        tokens += len(targets)
    return loss / tokens
