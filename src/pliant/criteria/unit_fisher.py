"""Importance of units, estimated from the gradient of the loss on calibration text."""

from __future__ import annotations

from typing import Any

import torch

from pliant.anatomy import Anatomy, Block, Weight
from pliant.criteria.scan_states import watching_states
from pliant.criteria.unit_readers import by_unit, readers, unheard
from pliant.device import to_float64
from pliant.forward.losses import nll_sum
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, within_memory
from pliant.pages import within_limit
from pliant.progress import Progress

Product = tuple[Block, Weight | None, torch.Tensor]
"""A block, a matrix of it that reads units or None for its scan, and a value times the gradient with respect to it."""


def loss_increases(
    model: Any, anatomy: Anatomy, windows: torch.Tensor, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Estimate the loss increase without each unit: half the diagonal of the empirical Fisher information of a factor
    on the unit (Kwon et al., 2022), with every token as one sample.

    The factor is on everything that matrices read of the unit, in one layer. No matrix reads the state of a scan: for
    its unit n the factor is on C_n of one group of heads. The gradient goes back through one layer at a time, so that
    only one layer's activations are in memory.

    Arguments:
        windows: token ids, shape ``(windows, seqlen)``.

    Returns:
        axis name -> nats per token, float64, shape ``axis.shape``; axes that no matrix reads (experts) are left
        out, and so are those with a matrix that is never called.
    """
    return within_memory(model, lambda tokens: _loss_increases(model, anatomy, windows, tokens, progress or Progress()))


def _loss_increases(
    model: Any, anatomy: Anatomy, windows: torch.Tensor, tokens: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """:func:`loss_increases` with ``tokens`` tokens per forward pass."""
    stream, depth = Stream(model.eval(), anatomy), anatomy.depth
    blocks = [[block for block in anatomy.blocks.values() if block.layer == layer] for layer in range(depth)]
    increases: dict[str, torch.Tensor] = {}
    called: set[tuple[str, str]] = set()
    tied = {axis.name for block in anatomy.blocks.values() if block.tied for axis in block.leaders}
    first = next((n for n in range(depth) if any(b.reading or b.state_axis for b in blocks[n])), depth)
    batches = batches_of(model, windows, tokens)
    for number, ids in enumerate(batches, 1):
        with torch.no_grad():
            entered = stream.run(ids, 0, depth)
        slope = _slope_of_loss(stream, ids, entered[depth], tokens)
        slopes: dict[tuple[str, int], torch.Tensor] = {}  # of units that several layers share, summed over the layers
        for layer in within_limit(model, reversed(range(first, depth))):
            products, slope = _back(stream, ids, layer, entered.get(layer), slope, blocks[layer])
            called |= {(block.name, weight.path) for block, weight, _ in products if weight is not None}
            for (name, count), of_tokens in _of_factors(products).items():
                if name in tied:
                    slopes[name, count] = slopes.get((name, count), 0) + of_tokens
                    continue
                increases[name] = increases.get(name, 0) + _fisher(of_tokens) / windows.numel()
        for (name, _), of_tokens in slopes.items():
            increases[name] = increases.get(name, 0) + _fisher(of_tokens) / windows.numel()
        progress.step(number / len(batches), f"batch {number} of {len(batches)}")
    left_out = unheard(readers(anatomy), called)
    return {name: found for name, found in increases.items() if name in anatomy.axes and name not in left_out}


@torch.enable_grad()
def _slope_of_loss(stream: Stream, ids: torch.Tensor, last: torch.Tensor, tokens: int) -> torch.Tensor:
    """Gradient of the summed loss with respect to the last hidden state, with logits of ``tokens`` positions at a
    time."""
    last = last.requires_grad_()
    slope = torch.zeros_like(last)
    for where, logits in stream.parts(ids, tokens, len(stream.layers), last):
        loss = nll_sum(logits, ids[:, where.start + 1 : where.stop + 1]).sum()
        slope += torch.autograd.grad(loss, last)[0]
    return slope


@torch.enable_grad()
def _back(
    stream: Stream,
    ids: torch.Tensor,
    layer: int,
    entered: torch.Tensor | None,
    slope: torch.Tensor,
    blocks: list[Block],
) -> tuple[list[Product], torch.Tensor]:
    """Run one layer forward and backward.

    Arguments:
        entered: hidden state before the layer; None for the embeddings.
        slope: gradient with respect to the hidden state after the layer.
        blocks: those of the layer.

    Returns:
        For every call of a matrix that reads units its input, and for every scan its C, times the gradient with
        respect to it; then the gradient with respect to ``entered``.
    """
    calls: list[tuple[Block, Weight | None, torch.Tensor, torch.Tensor]] = []

    def nudged(block: Block, weight: Weight | None, value: torch.Tensor) -> torch.Tensor:
        # zeros that have a gradient whether or not anything before them does
        nudge = torch.zeros_like(value, requires_grad=True)
        calls.append((block, weight, value.detach(), nudge))
        return value + nudge

    def hook(block: Block, weight: Weight):
        return lambda _module, args: (nudged(block, weight, args[0]), *args[1:])

    handles = [
        stream.layers[layer]
        .get_submodule(weight.path.rpartition(".")[0])
        .register_forward_pre_hook(hook(block, weight))
        for block in blocks
        for weight in block.reading
    ]
    try:
        entered = None if entered is None else entered.requires_grad_()
        with watching_states(stream.layers, blocks, lambda block, inputs: nudged(block, None, inputs.C)):
            output = stream.through(ids, layer, layer + 1, entered)
    finally:
        for handle in handles:
            handle.remove()
    variables = [nudge for *_, nudge in calls] + ([] if entered is None else [entered])
    # the rows of a removed scan are read, but nothing depends on them
    slopes = torch.autograd.grad(output, variables, slope, allow_unused=True, materialize_grads=True)
    products = [(*call[:2], call[2] * gradient) for call, gradient in zip(calls, slopes, strict=False)]
    return products, slopes[-1]


def _fisher(slopes: torch.Tensor) -> torch.Tensor:
    """Half the Fisher information, summed over the tokens, from slopes of shape ``(tokens, *axis.shape)``."""
    return slopes.square().sum(0).cpu() / 2


def _of_factors(products: list[Product]) -> dict[tuple[str, int], torch.Tensor]:
    """Gradient of the loss with respect to the factors on all units of one layer.

    Returns:
        (axis name, number of tokens) -> the gradient for every token, float64, shape ``(tokens, *axis.shape)``. A
        matrix that reads only some of the tokens has factors of its own.
    """
    slopes: dict[tuple[str, int], torch.Tensor] = {}
    for block, weight, product in products:
        if weight is None:
            state = block.state_axis
            assert state is not None
            of_axes = [(state, to_float64(product).reshape(-1, *state.shape))]
        else:
            of_axes = list(by_unit(block, weight, to_float64(product.flatten(0, -2))))
        for axis, of_units in of_axes:
            key = axis.name, len(of_units)
            slopes[key] = slopes.get(key, 0) + of_units
    return slopes
