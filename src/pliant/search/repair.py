"""Repair without training: refit the last matrix of every block that stays, so that the residual stream comes back to
what it was.

A block adds ``W x`` to the residual stream, where W is its last matrix. Walking through the layers, W is refitted by ridge
regression on calibration tokens: its inputs are what the cut model computes, its target is what the dense model's stream
is after this block less what the cut model's stream is before it. So a block also makes up for what was removed before
it, as far as it can. W is held to what it was (the penalty is on the change), which keeps few tokens from misleading it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pliant.anatomy import Anatomy, Block, Weight, layers_of
from pliant.elastic import Elastic, Subnet
from pliant.measure.stream import Stream
from pliant.measure.windows import batches_of
from pliant.pages import pages_of
from pliant.progress import Progress

EXACT = 1e-3  # how closely, as a share of it, a last matrix must explain what its block adds to the stream

Hidden = list[torch.Tensor | None]


@torch.no_grad()
def repair(
    model: Any, anatomy: Anatomy, subnet: Subnet, windows: torch.Tensor, ridge: float, progress: Progress
) -> list[dict[str, Any]]:
    """Refit, in place, the kept part of the last matrix of every block that ``subnet`` keeps.

    Arguments:
        model: the dense model, its units in the order that ``subnet`` speaks of. On an error it is left as it was.
        windows: token ids, shape ``(windows, seqlen)``.
        ridge: penalty on the change, as a multiple of the mean square of the inputs.

    Returns:
        For each block: its name, and the mean square distance of the stream from the dense one before and after; None
        where something else than a matrix comes last, which is left alone.
    """
    elastic, stream = Elastic(model.eval(), anatomy), Stream(model, anatomy)
    batches = batches_of(model, windows)
    pages = pages_of(model)
    keep = torch.clone if pages is None else pages.copy
    saved: dict[torch.Tensor, torch.Tensor] = {}
    dense: Hidden = [None] * len(batches)
    cut: Hidden = [None] * len(batches)
    told = []

    def advance(layer: int, active: Subnet, hidden: Hidden) -> list[torch.Tensor]:
        elastic.activate(active, stretch=True)
        return [stream.through(ids, layer, layer + 1, h) for ids, h in zip(batches, hidden, strict=True)]

    try:
        for layer in range(anatomy.depth):
            blocks = [block for block in anatomy.blocks.values() if block.layer == layer]
            later = {block.name: [other.name for other in blocks[i:]] for i, block in enumerate(blocks, 1)}
            # before anything in this layer changes, what the dense model computes in it
            wanted = {block.name: advance(layer, Subnet().without(*later[block.name]), dense) for block in blocks}
            dense = list(wanted[blocks[-1].name]) if blocks else dense
            # the cut model's stream between its blocks; before the first one it is what comes into the layer
            reached = advance(layer, subnet.without(*(block.name for block in blocks)), cut)
            for block in blocks:
                if block.name in subnet.skip:
                    continue
                weight = last_matrix(block)
                seen: list[tuple[torch.Tensor, torch.Tensor]] = []
                owner: Any = None
                handle = None
                if weight is not None:
                    elastic.activate(Subnet())
                    owner = elastic.layers[layer].get_submodule(weight.path.rpartition(".")[0])
                    saved |= {p: keep(p.detach()) for p in (owner.weight, owner.bias) if p is not None}
                    handle = owner.register_forward_hook(_recorder(seen))
                try:
                    after = advance(layer, subnet.without(*later[block.name]), cut)
                finally:
                    if handle is not None:
                        handle.remove()
                distance = None if weight is None else _refit(owner, seen, reached, after, wanted[block.name], ridge)
                told.append({"block": block.name, "distance": distance})
                reached = after
            cut = list(reached)
            progress.step((layer + 1) / anatomy.depth, f"layer {layer + 1} of {anatomy.depth}")
    except BaseException:
        for parameter, value in saved.items():
            parameter.copy_(value)
        raise
    finally:
        elastic.activate(Subnet())
    return told


def repair_bytes(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> int:
    """Memory that :func:`repair` takes beside the weights: the stream in several states, what goes into one matrix and comes
    out of it, and the normal equations."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    last = (last_matrix(block) for block in anatomy.blocks.values())
    layers = layers_of(model, anatomy.architecture)
    shapes = [
        w.tensor(layers[b.layer]).shape[w.reads or 0]
        for b, w in zip(anatomy.blocks.values(), last, strict=True)
        if w is not None
    ]
    widest = max(shapes, default=hidden)
    element = next(model.parameters()).element_size()
    return windows.numel() * (widest + 8 * hidden) * element + 4 * widest * widest * 8


def _recorder(seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
    """A hook that notes what goes into a module and what comes out, which a layer may change afterwards."""
    return lambda _module, args, out: seen.append((args[0], out.clone()))


def last_matrix(block: Block) -> Weight | None:
    """The matrix whose output is the block's: it reads an axis and writes the residual stream."""
    found = None
    for weight in block.weights:
        if weight.reads is not None and len(weight.dims) == 2:
            reads, writes = weight.dims[weight.reads], weight.dims[1 - weight.reads]
            if any(part.axis in block.axes for part in reads) and all(part.axis in block.fixed for part in writes):
                found = weight
    return found


def _refit(
    owner: Any,
    seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
    before: Sequence[torch.Tensor],
    after: list[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    ridge: float,
) -> dict[str, float] | None:
    """Change the matrix of ``owner``, now a view of what is kept, by ridge regression.

    Arguments:
        seen: inputs and outputs of the matrix, batch by batch.
        before, after: the cut model's stream around the block; ``after`` becomes what it is with the new matrix.
        wanted: the dense model's stream after it.
    """
    inputs = owner.weight.shape[0] if isinstance(owner, Conv1D) else owner.weight.shape[1]
    size = inputs + (owner.bias is not None)
    gram = torch.zeros(size, size, dtype=torch.float64, device=owner.weight.device)
    cross = gram.new_zeros(size, wanted[0].shape[-1])
    total, count, scale = 0.0, 0, None
    for (x, y), start, end, target in zip(seen, before, after, wanted, strict=True):
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        added = (end - start).flatten(0, -2).float()
        if scale is None:  # some families scale what a block adds
            scale = ((added * y).sum() / (y * y).sum().clamp_min(1e-30)).item()
        if not (added - scale * y).norm() <= EXACT * added.norm() or not scale:
            return None
        goal = target.flatten(0, -2).float()
        missing = (goal - end.flatten(0, -2).float()) / scale
        if owner.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        # what comes next normalises each token: an error counts by the size of the stream it is in
        weight = goal.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        x, missing = x * weight, missing * weight
        gram += (x.T @ x).double()
        cross += (x.T @ missing).double()
        total += missing.double().pow(2).sum().item()
        count += missing.numel()
    assert scale is not None
    held = gram + ridge * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(held, cross)
    for place, (x, _) in enumerate(seen):
        moved = x.float() @ change[:inputs].float() + (change[inputs].float() if owner.bias is not None else 0)
        after[place] = after[place] + (scale * moved).view_as(after[place]).to(after[place].dtype)
    left = total - 2 * (change * cross).sum().item() + (change * (gram @ change)).sum().item()
    if owner.bias is not None:
        owner.bias.add_(change[-1].to(owner.bias.dtype))
        change = change[:-1]
    owner.weight.add_((change if isinstance(owner, Conv1D) else change.T).to(owner.weight.dtype))
    return {"before": total / count, "after": max(0.0, left) / count}
