"""What single blocks matter, from one look at the model: cheap rankings, to compare a search with or to narrow it down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.device import doubled, total
from pliant.elastic import Elastic, Subnet
from pliant.forward.losses import nll
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, tokens_at_once, within_memory

Ranking = dict[str, float]


def influence(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> Ranking:
    """Block Influence: one minus the mean cosine of the residual stream before and after a block (ShortGPT, 2024)."""
    return _by_stream(model, anatomy, windows, lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1))


def relative_magnitude(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> Ranking:
    """Mean size of what a block adds, as a share of the residual stream after it (Samragh et al., 2023)."""
    return _by_stream(model, anatomy, windows, lambda x, y: (y - x).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12))


@torch.inference_mode()
def _by_stream(
    model: Any,
    anatomy: Anatomy,
    windows: torch.Tensor,
    per_token: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Ranking:
    """The mean over all tokens of a measure of the stream before and after each block.

    The stream between two blocks of a layer is what the layer gives when its later blocks are skipped.
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
                blocks = [block.name for block in anatomy.blocks.values() if block.layer == layer]
                reached = []
                for place in range(len(blocks) + 1):
                    elastic.activate(Subnet(frozenset(blocks[place:])), stretch=True)
                    reached.append(stream.through(ids, layer, layer + 1, hidden))
                for name, before, after in zip(blocks, reached, reached[1:], strict=False):
                    sums[name] += total(per_token(before.float(), after.float())).item()
                hidden = reached[-1]
    finally:
        elastic.activate(Subnet())
    return {name: value / sum(ids.numel() for ids in batches) for name, value in sums.items()}


def taylor(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> Ranking:
    """First-order estimate of what the loss rises by when a block is gone: minus the gradient of the loss along what the block adds."""
    return {name: -gradients.mean().item() for name, gradients in _gates(model, anatomy, windows).items()}


def fisher(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> Ranking:
    """Half the mean square of that gradient over windows: the second-order estimate with the empirical Fisher."""
    return {name: gradients.square().mean().item() / 2 for name, gradients in _gates(model, anatomy, windows).items()}


def _gates(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Derivative of each window's mean loss by a factor on what each block adds, float64, shape ``(windows,)``."""
    elastic = Elastic(model.eval(), anatomy)
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str, residual: int | None):
        def hook(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            whole = output[0] if isinstance(output, tuple) else output
            whole.retain_grad()
            given = (*args, *kwargs.values())
            outputs[name] = whole
            added[name] = whole.detach() - (0 if residual is None else given[residual].detach())

        return hook

    added: dict[str, torch.Tensor] = {}
    # a block ends with its module, or with a norm that follows it: what runs last overwrites what ran before
    handles = [
        elastic.layers[block.layer]
        .get_submodule(path)
        .register_forward_hook(
            record(name, block.spec.residual if path == block.spec.module else None), with_kwargs=True
        )
        for name, block in anatomy.blocks.items()
        for path in (*block.removed, block.spec.module)
    ]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found: dict[str, list[float]] = {name: [] for name in anatomy.blocks}
    try:
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)  # so that everything behind it has a gradient
        for window in windows.to(next(model.parameters()).device):
            loss = nll(model(input_ids=window[None], use_cache=False).logits, window[None]).sum()
            loss.backward()
            for name, output in outputs.items():
                slope = output.grad
                assert slope is not None
                found[name].append((doubled(slope) * doubled(added[name])).sum().item())
            outputs.clear()
            added.clear()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)
        model.get_input_embeddings().weight.grad = None
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


RANKINGS: dict[str, Callable[[Any, Anatomy, torch.Tensor], Ranking]] = {
    "influence": influence,
    "magnitude": relative_magnitude,
    "taylor": taylor,
    "fisher": fisher,
}
