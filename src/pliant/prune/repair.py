"""Repair without training: refit the last matrix of every remaining block, so that the residual stream returns to that
of the dense model.

A block adds ``W x`` to the residual stream, where W is its last matrix. Layer by layer, W is refitted by ridge
regression on calibration tokens: its inputs are those in the cut model, its target is the dense model's stream after
this block minus the cut model's stream before it. So a block also compensates for what was removed before it, as far as
it can. The penalty is on the change of W, so that few tokens do not mislead the fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pliant.anatomy import Anatomy, Block, Weight, layers_of
from pliant.device import to_float64
from pliant.elastic import Elastic, Subnet
from pliant.elastic.activate import give_back
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, tokens_at_once, within_memory
from pliant.pages import pages_of
from pliant.progress import Progress
from pliant.runtime.dense import weight_of

EXACT = 1e-3  # largest relative error with which a last matrix must explain the output of its block
ROUNDS = 16  # of alternating least squares for a norm behind the matrix; gemma2, gemma3 and olmo2 take one to three
FAINT = 0.1  # share of the root mean square; channels that a norm scales below it would change too much: left out

Hidden = list[torch.Tensor | None]
Seen = list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def repair(
    model: Any, anatomy: Anatomy, subnet: Subnet, windows: torch.Tensor, ridge: float, progress: Progress
) -> list[dict[str, Any]]:
    """Refit, in place, the kept part of the last matrix of every block that ``subnet`` keeps.

    Arguments:
        model: the dense model, its units sorted as ``subnet`` expects. On an error its weights are restored.
        windows: token ids, shape ``(windows, seqlen)``.
        ridge: penalty on the change, as a multiple of the mean square of the inputs.

    Returns:
        For each block: its name, and the mean square distance of the stream from the dense one before and after; None
        for a block that is not refitted: it does not end in a matrix, or a matrix and a norm, or others share it.
    """
    return within_memory(
        model,
        lambda tokens: _repair(model, anatomy, subnet, batches_of(model, windows, tokens), ridge, progress),
        max(tokens_at_once(model), windows.shape[1]),
    )


def _repair(
    model: Any, anatomy: Anatomy, subnet: Subnet, batches: list[torch.Tensor], ridge: float, progress: Progress
) -> list[dict[str, Any]]:
    elastic, stream = Elastic(model.eval(), anatomy), Stream(model, anatomy)
    shared = Counter(block.tied or block.name for block in anatomy.alive(subnet.skip))
    pages = pages_of(model)
    keep = torch.clone if pages is None else pages.copy
    saved: dict[torch.Tensor, torch.Tensor] = {}
    dense: Hidden = [None] * len(batches)
    cut: Hidden = [None] * len(batches)
    fits = []

    def advance(layer: int, active: Subnet, hidden: Hidden) -> list[torch.Tensor]:
        elastic.activate(active, stretch=True)
        return [stream.through(ids, layer, layer + 1, h) for ids, h in zip(batches, hidden, strict=True)]

    try:
        for layer in range(anatomy.depth):
            blocks = [block for block in anatomy.blocks.values() if block.layer == layer]
            later = {block.name: [other.name for other in blocks[i:]] for i, block in enumerate(blocks, 1)}
            # the dense model's stream, computed before anything in this layer changes
            targets = {block.name: advance(layer, Subnet().without(*later[block.name]), dense) for block in blocks}
            dense = list(targets[blocks[-1].name]) if blocks else dense
            # the cut model's stream between its blocks; before the first one it is the input of the layer
            incoming = advance(layer, subnet.without(*(block.name for block in blocks)), cut)
            for block in blocks:
                if block.name in subnet.skip:
                    continue
                # a refit in one layer would spoil the outputs of the other layers that use the matrix, too
                weight = last_matrix(block) if shared[block.tied or block.name] == 1 else None
                seen: Seen = []
                owner: Any = None
                handle = full = None
                if weight is not None:
                    elastic.activate(Subnet())
                    owner = elastic.layers[layer].get_submodule(weight.path.rpartition(".")[0])
                    full = owner.weight
                    saved |= {p: keep(p.detach()) for p in (owner.weight, owner.bias) if p is not None}
                    # with a copy of the output, which a layer may change in place
                    handle = owner.register_forward_hook(
                        lambda _, args, out, seen=seen: seen.append((args[0], out.clone()))
                    )
                try:
                    after = advance(layer, subnet.without(*later[block.name]), cut)
                finally:
                    if handle is not None:
                        handle.remove()
                distance = None
                factors = None if weight is None else _factors(seen, incoming, after)
                if factors is not None and weight is not None and full is not None:
                    change = _refit(owner, seen, factors, after, targets[block.name], ridge)
                    give_back(owner.weight, full, block, weight, subnet.kept(block))
                    before = _distance(after, targets[block.name])
                    if factors.normed or owner.weight.dtype.itemsize < change.itemsize:
                        after = advance(layer, subnet.without(*later[block.name]), cut)
                    else:  # linear in the change, which the weights hold exactly: no need to run the layer again
                        after = _moved(after, seen, factors, change, owner)
                    distance = {"before": before, "after": _distance(after, targets[block.name])}
                fits.append({"block": block.name, "distance": distance})
                incoming = after
            cut = list(incoming)
            progress.step((layer + 1) / anatomy.depth, f"layer {layer + 1} of {anatomy.depth}")
    except BaseException:
        for parameter, value in saved.items():
            parameter.copy_(value)
        raise
    finally:
        elastic.activate(Subnet())
    return fits


def repair_bytes(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> int:
    """Memory that :func:`repair` takes besides the weights: several copies of the stream, the inputs and outputs of one
    matrix, and the normal equations."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    last = (last_matrix(block) for block in anatomy.blocks.values())
    layers = layers_of(model, anatomy.source)
    shapes = [
        w.tensor(layers[b.layer]).shape[w.reads or 0]
        for b, w in zip(anatomy.blocks.values(), last, strict=True)
        if w is not None
    ]
    widest = max(shapes, default=hidden)
    element = next(model.parameters()).element_size()
    streams = (widest + 8 * hidden) * element
    compared = (widest + 4 * hidden) * 4  # outputs, differences and rounding errors, always in float32
    return windows.numel() * (streams + compared) + 4 * widest * widest * 8


def last_matrix(block: Block) -> Weight | None:
    """The matrix whose output is the block's: it reads an axis and writes the residual stream."""
    last = None
    for weight in block.weights:
        if weight.reads is not None and len(weight.dims) == 2:
            reads, writes = weight.dims[weight.reads], weight.dims[1 - weight.reads]
            if any(part.axis in block.axes for part in reads) and all(part.axis in block.fixed for part in writes):
                last = weight
    return last


@dataclass(frozen=True)
class _Factors:
    """The factors between the output of a matrix and the residual stream.

    Attributes:
        tokens: a factor for every token, batch by batch, shape ``(tokens, 1)``; shape ``(1, 1)`` if it is the same for
            all.
        channels: a factor for every channel, shape ``(hidden,)``.
    """

    tokens: list[torch.Tensor]
    channels: torch.Tensor

    @property
    def normed(self) -> bool:
        """Whether the factors depend on the token."""
        return any(len(tokens) > 1 for tokens in self.tokens)


def _factors(seen: Seen, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> _Factors | None:
    """Find the factors of a residual multiplier or of an RMS norm, from the output of the matrix and that of the block;
    None if factors do not explain it.

    Arguments:
        seen: inputs and outputs of the matrix, batch by batch.
        before, after: the stream around the block.
    """
    written = [y.flatten(0, -2).float() for _, y in seen]
    added, blurred = [], []
    for start, end in zip(before, after, strict=True):
        start, end, eps = start.flatten(0, -2).float(), end.flatten(0, -2).float(), torch.finfo(end.dtype).eps
        added.append(end - start)
        blurred.append(eps * (start.abs() + end.abs() + added[-1].abs()))  # the rounding error
    whole = sum(a.pow(2).sum() for a in added)
    channels = torch.ones_like(added[0][0])
    tokens = [_ratio(torch.cat(added).view(1, -1), torch.cat(written).view(1, -1), -1)] * len(written)
    for _ in range(ROUNDS):
        off = sum(
            ((a - t * channels * y).abs() - blur).clamp_min(0).pow(2).sum()
            for a, y, t, blur in zip(added, written, tokens, blurred, strict=True)
        )
        if off <= EXACT**2 * whole:
            return _Factors(tokens, channels) if whole > 0 else None
        scaled = [y * channels for y in written]
        tokens = [_ratio(a, y, -1) for a, y in zip(added, scaled, strict=True)]
        scaled = [y * t for y, t in zip(written, tokens, strict=True)]
        channels = _ratio(torch.cat(added), torch.cat(scaled), 0)[0]
    return None


def _ratio(of: torch.Tensor, to: torch.Tensor, dim: int) -> torch.Tensor:
    """The factor that brings ``to`` nearest to ``of`` along a dimension, which is kept."""
    return (of * to).sum(dim, keepdim=True) / to.pow(2).sum(dim, keepdim=True).clamp_min(1e-30)


def _refit(
    owner: Any,
    seen: Seen,
    factors: _Factors,
    after: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    ridge: float,
) -> torch.Tensor:
    """Change the matrix of ``owner``, now a view of its kept part, by ridge regression.

    Arguments:
        seen: inputs and outputs of the matrix, batch by batch.
        factors: the factors between the matrix and the stream.
        after: the cut model's stream after the block.
        targets: the dense model's stream at that point.

    Returns:
        The change, shape ``(inputs, hidden)``; with a bias, its change is the last row.
    """
    heard = factors.channels.abs() > FAINT * factors.channels.pow(2).mean().sqrt()
    inverse = torch.where(heard, 1 / factors.channels, 0)
    gram: Any = 0.0
    cross: Any = 0.0
    for (x, _), end, target, factor in zip(seen, after, targets, factors.tokens, strict=True):
        goal = target.flatten(0, -2).float()
        weight = _weight(goal)
        x = _inputs(x, owner) * factor * weight
        missing = (goal - end.flatten(0, -2).float()) * inverse * weight
        gram = gram + to_float64(x.T @ x)
        cross = cross + to_float64(x.T @ missing)
    held = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(held, cross)
    matrix = change
    if owner.bias is not None:
        owner.bias.add_(_like(change[-1], owner.bias))
        matrix = change[:-1]
    weight_of(owner).add_(_like(matrix.T, owner.weight))
    return change.float().to(owner.weight.device)


def _like(change: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``change`` in a parameter's dtype and on its device; converted first, because the device may have no float64."""
    return change.to(parameter.dtype).to(parameter.device)


def _inputs(x: torch.Tensor, owner: Any) -> torch.Tensor:
    """The inputs of a matrix, one row per token; with a bias, a column of ones is appended."""
    x = x.flatten(0, -2).float()
    return x if owner.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)


def _moved(
    after: Sequence[torch.Tensor], seen: Seen, factors: _Factors, change: torch.Tensor, owner: Any
) -> list[torch.Tensor]:
    """The stream after the block with the new matrix, if the factors stay the same."""
    return [
        end + (_inputs(x, owner) @ change * factor * factors.channels).view_as(end).to(end.dtype)
        for end, (x, _), factor in zip(after, seen, factors.tokens, strict=True)
    ]


def _weight(goal: torch.Tensor) -> torch.Tensor:
    """Weight of each token: the next block normalises it, so an error counts relative to the size of the stream."""
    return goal.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _distance(states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
    """Mean square distance of the stream from the dense one, relative to the latter's mean square, token by token."""
    distance = 0.0
    for here, there in zip(states, targets, strict=True):
        goal = there.float()
        distance += to_float64((here.float() - goal) * _weight(goal)).pow(2).sum().item()
    return distance / sum(there.numel() for there in targets)
