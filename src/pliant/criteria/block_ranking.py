"""Rank single blocks by importance in one pass over the model: cheap baselines for a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.device import total
from pliant.elastic import Elastic, Subnet
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, tokens_at_once, within_memory

Ranking = dict[str, float]


def influence(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> Ranking:
    """Block Influence: one minus the mean cosine of the residual stream before and after a block (ShortGPT, 2024)."""
    return _by_stream(model, anatomy, windows, lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1))


def relative_magnitude(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> Ranking:
    """Mean norm of a block's output, relative to the residual stream after it (Samragh et al., 2023)."""
    return _by_stream(model, anatomy, windows, lambda x, y: (y - x).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12))


@torch.inference_mode()
def _by_stream(
    model: Any,
    anatomy: Anatomy,
    windows: torch.Tensor,
    per_token: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Ranking:
    """The mean over all tokens of a measure of the stream before and after each block.

    The stream between two blocks of a layer is the output of the layer when its later blocks are skipped.
    """
    return within_memory(
        model,
        lambda tokens: _means(model, anatomy, batches_of(model, windows, tokens), per_token),
        max(tokens_at_once(model), windows.shape[1]),
    )


def _means(
    model: Any,
    anatomy: Anatomy,
    batches: list[torch.Tensor],
    per_token: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Ranking:
    elastic, stream = Elastic(model.eval(), anatomy), Stream(model, anatomy)
    sums = dict.fromkeys(anatomy.blocks, 0.0)
    try:
        for ids in batches:
            hidden: torch.Tensor | None = None
            for layer in range(anatomy.depth):
                here = [block for block in anatomy.blocks.values() if block.layer == layer]
                # a block inside another has an effect only with that one
                blocks = [block.name for block in sorted(here, key=lambda block: len(anatomy.outside(block)))]
                states = []
                for count in range(len(blocks) + 1):
                    elastic.activate(Subnet(frozenset(blocks[count:])), stretch=True)
                    states.append(stream.through(ids, layer, layer + 1, hidden))
                for name, before, after in zip(blocks, states, states[1:], strict=False):
                    sums[name] += total(per_token(before.float(), after.float())).item()
                hidden = states[-1]
    finally:
        elastic.activate(Subnet())
    return {name: value / sum(ids.numel() for ids in batches) for name, value in sums.items()}


RANKINGS: dict[str, Callable[[Any, Anatomy, torch.Tensor], Ranking]] = {
    "influence": influence,
    "magnitude": relative_magnitude,
}
