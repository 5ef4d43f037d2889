"""Importance of units, measured from their activations on calibration text."""

from __future__ import annotations

from typing import Any

import torch

from pliant.anatomy import Anatomy, Block, evaluating, layers_of
from pliant.compat.scan import ScanInputs
from pliant.criteria.scan_states import state_squares, watching_states
from pliant.criteria.unit_readers import by_unit, readers, unheard
from pliant.device import to_float64
from pliant.forward.windows import batches_of, tokens_at_once, within_memory


@torch.inference_mode()
def activation_sizes(model: Any, anatomy: Anatomy, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """How much every unit of every axis contributes on calibration text.

    A unit is read by matrices (``down_proj`` reads channels, ``o_proj`` heads). Its size is the root mean square of
    each of its elements times the norm of the matrix column that reads it, summed over all its elements and readers.
    This is the score of Wanda (Sun et al., 2023), summed over whole columns. No matrix reads the state of a scan: the
    size of its unit n is the root of the sum of squares of what it adds to the output, ``C_n h_n``; each group of heads
    has a copy of the unit with a size of its own.

    Arguments:
        windows: token ids, shape ``(windows, seqlen)``.

    Returns:
        axis name -> size of each unit, shape ``axis.shape``; axes that no matrix reads (experts) are left out, and so
        are those with a matrix that is never called.
    """
    return within_memory(
        model,
        lambda tokens: _sizes(model, anatomy, batches_of(model, windows, tokens)),
        max(tokens_at_once(model), windows.shape[1]),
    )


def _sizes(model: Any, anatomy: Anatomy, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    layers = layers_of(model, anatomy.source)
    sizes: dict[str, torch.Tensor] = {}
    squares: dict[tuple[str, str], torch.Tensor] = {}
    states: dict[str, torch.Tensor] = {}
    watched = readers(anatomy)

    def record(key: tuple[str, str]):
        def hook(_module: Any, args: tuple) -> None:
            squared = to_float64(args[0].flatten(0, -2)).square().sum(0)
            squares[key] = squares[key] + squared if key in squares else squared

        return hook

    def record_state(block: Block, inputs: ScanInputs) -> torch.Tensor:
        assert block.state_axis is not None
        name = block.state_axis.name
        states[name] = states.get(name, 0) + state_squares(inputs).view(block.state_axis.shape)
        return inputs.C

    handles = [
        layers[block.layer]
        .get_submodule(weight.path.rpartition(".")[0])
        .register_forward_pre_hook(record((block.name, weight.path)))
        for block, weight in watched
    ]
    try:
        with evaluating(model), watching_states(layers, list(anatomy.blocks.values()), record_state):
            for ids in batches:
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    left_out = unheard(watched, squares)
    for block, weight in watched:
        if (block.name, weight.path) not in squares:
            continue
        assert weight.reads is not None
        columns = to_float64(weight.tensor(layers[block.layer])).square().sum(1 - weight.reads)
        contributions = (squares[block.name, weight.path] * columns).sqrt().cpu()
        for axis, per_unit in by_unit(block, weight, contributions):
            sizes[axis.name] = sizes.get(axis.name, 0) + per_unit
    sizes |= {name: total.sqrt() for name, total in states.items()}
    return {name: size for name, size in sizes.items() if name in anatomy.axes and name not in left_out}
