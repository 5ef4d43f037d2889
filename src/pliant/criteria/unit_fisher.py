"""Which units matter, from the gradient of the loss on calibration text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy, Block, Weight, layers_of
from pliant.criteria.unit_readers import by_unit, read_axes, readers
from pliant.device import doubled
from pliant.forward.losses import nll_sum
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, within_memory
from pliant.pages import within_limit
from pliant.progress import Progress


def damage_of_units(
    model: Any, anatomy: Anatomy, windows: torch.Tensor, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """What the loss would rise by without each unit, one at a time: half the diagonal of the empirical Fisher information of
    a factor on the unit (Kwon et al., 2022), each token for itself.

    The gradient goes back through one layer at a time, so that of all that a layer computes only one layer's is in memory.

    Arguments:
        windows: token ids, shape ``(windows, seqlen)``.

    Returns:
        axis name -> nats per token, float64, shape ``(units,)``; axes that no matrix reads (experts) are left out.
    """
    return within_memory(model, lambda tokens: _damage(model, anatomy, windows, tokens, progress or Progress()))


def _damage(
    model: Any, anatomy: Anatomy, windows: torch.Tensor, tokens: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """:func:`damage_of_units` with ``tokens`` tokens in a forward pass."""
    stream, depth = Stream(model.eval(), anatomy), anatomy.depth
    layers = layers_of(model, anatomy.source)
    watched: list[list[tuple[nn.Module, Block, Weight]]] = [[] for _ in range(depth)]
    for block, weight in readers(anatomy):
        module = layers[block.layer].get_submodule(weight.path.rpartition(".")[0])
        watched[block.layer].append((module, block, weight))
    found = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in read_axes(anatomy)}
    first = next((layer for layer in range(depth) if watched[layer]), depth)
    batches = batches_of(model, windows, tokens)
    for number, ids in enumerate(batches, 1):
        with torch.no_grad():
            entered = stream.run(ids, 0, depth)
        slope = _slope_of_loss(stream, ids, entered[depth], tokens)
        for layer in within_limit(model, reversed(range(first, depth))):
            modules = [module for module, _, _ in watched[layer]]
            products, slope = _back(stream, ids, layer, entered.get(layer), slope, modules)
            for place, product in products:
                for axis, own in by_unit(*watched[layer][place][1:], doubled(product.flatten(0, -2))):
                    if axis.name in found:
                        found[axis.name] += own.square().sum(0).cpu() / (2 * windows.numel())
        progress.step(number / len(batches), f"batch {number} of {len(batches)}")
    return found


@torch.enable_grad()
def _slope_of_loss(stream: Stream, ids: torch.Tensor, last: torch.Tensor, tokens: int) -> torch.Tensor:
    """Gradient of the summed loss with respect to the last hidden state, with logits of ``tokens`` positions at a time."""
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
    """One layer forwards and back again.

    Arguments:
        entered: hidden state before it; None for the embeddings.
        slope: gradient by the hidden state after it.

    Returns:
        Of every call of one of ``modules`` its place, and what goes in times the gradient by it; the gradient by ``entered``.
    """
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def watch(place: int):
        def hook(_module: nn.Module, args: tuple) -> tuple:
            nudge = torch.zeros_like(
                args[0], requires_grad=True
            )  # has a gradient whether or not anything before it does
            calls.append((place, args[0].detach(), nudge))
            return (args[0] + nudge, *args[1:])

        return hook

    handles = [module.register_forward_pre_hook(watch(place)) for place, module in enumerate(modules)]
    try:
        entered = None if entered is None else entered.requires_grad_()
        left = stream.through(ids, layer, layer + 1, entered)
    finally:
        for handle in handles:
            handle.remove()
    wanted = [nudge for _, _, nudge in calls] + ([] if entered is None else [entered])
    slopes = torch.autograd.grad(left, wanted, slope)
    products = [(place, value * found) for (place, value, _), found in zip(calls, slopes, strict=False)]
    return products, slopes[-1]
