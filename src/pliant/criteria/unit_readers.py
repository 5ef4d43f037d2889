"""Find the matrices that read an axis, and sum per-element measurements into per-unit ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch

from pliant.anatomy import Anatomy, Axis, Block, Weight
from pliant.architecture import Part


def readers(anatomy: Anatomy) -> list[tuple[Block, Weight]]:
    """The matrices whose inputs are units of their block and nothing else: ``down_proj`` reads channels, ``o_proj``
    heads."""
    return [(block, weight) for block in anatomy.blocks.values() for weight in block.reading]


def measured_axes(anatomy: Anatomy) -> list[Axis]:
    """The axes that can be cut and are measured on text: those that matrices read, and the states of scans."""
    names = {
        block.axes[leader].name
        for block, weight in readers(anatomy)
        for leader in block.leaders_of(weight.dims[weight.reads or 0])
    }
    names |= {state.name for block in anatomy.blocks.values() if (state := block.state_axis) is not None}
    return [axis for axis in anatomy.axes.values() if axis.name in names]


def unheard(watched: Iterable[tuple[Block, Weight]], called: Collection[tuple[str, str]]) -> set[str]:
    """The axes with a reader that was never called: other code reads its weight, so its inputs are unknown.

    Arguments:
        called: (block, path of the weight) of the readers that were called.
    """
    return {
        block.axes[leader].name
        for block, weight in watched
        if (block.name, weight.path) not in called
        for leader in block.leaders_of(weight.dims[weight.reads or 0])
    }


def by_unit(block: Block, weight: Weight, elements: torch.Tensor) -> Iterator[tuple[Axis, torch.Tensor]]:
    """Sum values of single elements over each unit.

    Arguments:
        elements: a value for every input of ``weight``, shape ``(…, inputs)``.

    Yields:
        An axis that determines some of the inputs, and the sum for each of its units, shape ``(…, *axis.shape)``.
    """
    assert weight.reads is not None
    start = 0
    for part in weight.dims[weight.reads]:
        width = block.width(part, {})
        yield from sums(block, part, elements[..., start : start + width])
        start += width


def sums(block: Block, part: Part, elements: torch.Tensor) -> Iterator[tuple[Axis, torch.Tensor]]:
    """Sum values of single elements over each unit of every leading axis that determines a stretch of a dimension.

    Arguments:
        elements: a value for every element of the stretch, shape ``(…, elements)``.

    Yields:
        A leading axis, and the sum for each of its units, shape ``(…, *axis.shape)``.
    """
    if part.axis not in block.axes:
        return
    (copied, _), (grouped, _), (leader, _), _ = nested = block.by_leader(part)
    split = elements.unflatten(-1, [size for _, size in nested])
    own, of_copies = block.axes[str(leader)], split.sum(-1).flatten(-2)
    yield own, of_copies.sum(-2) if own.copies == 1 else of_copies
    if grouped is not None:
        yield block.axes[grouped], split.sum((-4, -2, -1))
    if copied is not None:
        yield block.axes[copied], split.sum((-3, -2, -1))
