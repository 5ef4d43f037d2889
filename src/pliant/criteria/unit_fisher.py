"""Importance of units, estimated from the gradient of the loss on calibration text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy, Block, Weight, layers_of
from pliant.criteria.unit_readers import by_unit, read_axes, readers
from pliant.device import to_float64
from pliant.forward.losses import nll_sum
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, within_memory
from pliant.pages import within_limit
from pliant.progress import Progress


def loss_increases(
    model: Any, anatomy: Anatomy, windows: torch.Tensor, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Estimate the loss increase without each unit: half the diagonal of the empirical Fisher information of a factor
    on the unit (Kwon et al., 2022), with every token as one sample.

    The gradient goes back through one layer at a time, so that only one layer's activations are in memory.

    Arguments:
        windows: token ids, shape ``(windows, seqlen)``.

    Returns:
        axis name -> nats per token, float64, shape ``(units,)``; axes that no matrix reads (experts) are left out.
    """
    return within_memory(model, lambda tokens: _loss_increases(model, anatomy, windows, tokens, progress or Progress()))


def _loss_increases(
    model: Any, anatomy: Anatomy, windows: torch.Tensor, tokens: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """:func:`loss_increases` with ``tokens`` tokens per forward pass."""
    stream, depth = Stream(model.eval(), anatomy), anatomy.depth
    layers = layers_of(model, anatomy.source)
    watched: list[list[tuple[nn.Module, Block, Weight]]] = [[] for _ in range(depth)]
    for block, weight in readers(anatomy):
        module = layers[block.layer].get_submodule(weight.path.rpartition(".")[0])
        watched[block.layer].append((module, block, weight))
    increases = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in read_axes(anatomy)}
    first = next((layer for layer in range(depth) if watched[layer]), depth)
    batches = batches_of(model, windows, tokens)
    for number, ids in enumerate(batches, 1):
        with torch.no_grad():
            entered = stream.run(ids, 0, depth)
        slope = _slope_of_loss(stream, ids, entered[depth], tokens)
        for layer in within_limit(model, reversed(range(first, depth))):
            modules = [module for module, _, _ in watched[layer]]
            products, slope = _back(stream, ids, layer, entered.get(layer), slope, modules)
            for index, product in products:
                for axis, per_unit in by_unit(*watched[layer][index][1:], to_float64(product.flatten(0, -2))):
                    if axis.name in increases:
                        increases[axis.name] += per_unit.square().sum(0).cpu() / (2 * windows.numel())
        progress.step(number / len(batches), f"batch {number} of {len(batches)}")
    return increases


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
    modules: list[nn.Module],
) -> tuple[list[tuple[int, torch.Tensor]], torch.Tensor]:
    """Run one layer forward and backward.

    Arguments:
        entered: hidden state before the layer; None for the embeddings.
        slope: gradient with respect to the hidden state after the layer.

    Returns:
        For every call of one of ``modules`` its index, and its input times the gradient with respect to it; then the
        gradient with respect to ``entered``.
    """
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def watch(index: int):
        def hook(_module: nn.Module, args: tuple) -> tuple:
            # zeros that have a gradient whether or not anything before them does
            nudge = torch.zeros_like(args[0], requires_grad=True)
            calls.append((index, args[0].detach(), nudge))
            return (args[0] + nudge, *args[1:])

        return hook

    handles = [module.register_forward_pre_hook(watch(index)) for index, module in enumerate(modules)]
    try:
        entered = None if entered is None else entered.requires_grad_()
        output = stream.through(ids, layer, layer + 1, entered)
    finally:
        for handle in handles:
            handle.remove()
    variables = [nudge for _, _, nudge in calls] + ([] if entered is None else [entered])
    slopes = torch.autograd.grad(output, variables, slope)
    products = [(index, value * gradient) for (index, value, _), gradient in zip(calls, slopes, strict=False)]
    return products, slopes[-1]
