"""Put the units of an axis in another order without changing what the model computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pliant.anatomy import Anatomy, Block, counted_once, layers_of
from pliant.architecture import Part
from pliant.errors import SubnetError
from pliant.pages import within_limit


@torch.no_grad()
def reorder(model: nn.Module, anatomy: Anatomy, orders: Mapping[str, torch.Tensor]) -> None:
    """Permute units in place, in every tensor that the axis touches.

    Arguments:
        orders: axis name -> the old index of each new unit, shape ``(units,)``. Axes that follow are reordered, too. If
            the groups of an axis are also reordered, its own order counts in the old groups.

    Raises:
        SubnetError: an axis is unknown, or its order is not a permutation within its groups.
    """
    layers = layers_of(model, anatomy.source)
    axes = anatomy.axes
    for name, order in orders.items():
        if name not in axes:
            raise SubnetError(f"the model has no axis {name!r} to reorder; anatomy_of(model).axes lists them")
        if sorted(order.tolist()) != list(range(axes[name].size)):
            raise SubnetError(f"the order given for {name} is not a permutation of {axes[name].size} units")
        in_group = axes[name].size // axes[name].groups
        if (order.cpu() // max(1, in_group) != torch.arange(axes[name].size) // max(1, in_group)).any():
            raise SubnetError(f"the order given for {name} moves units into another of its {axes[name].groups} groups")
    for block, own in counted_once(anatomy.blocks.values()):
        if not own:  # a block tied to it has been reordered
            continue
        chosen = {axis.leader: orders[axis.name] for axis in block.leaders if axis.name in orders}
        if not chosen:
            continue
        for weight in within_limit(model, block.weights):
            parameter = weight.tensor(layers[block.layer])
            for position, dim in enumerate(weight.dims):
                if not block.leaders_of(dim).isdisjoint(chosen):
                    index = _elements(block, dim, chosen).to(parameter.device)
                    parameter.copy_(parameter.index_select(position, index))


def restore(model: nn.Module, anatomy: Anatomy, orders: Mapping[str, torch.Tensor]) -> None:
    """Undo :func:`reorder`."""
    blocks = anatomy.blocks.values()
    groups = {block.axes[axis.grouped_by].name for block in blocks for axis in block.leaders if axis.grouped_by}
    for names in (orders.keys() & groups, orders.keys() - groups):  # groups first: orders count in the old ones
        reorder(model, anatomy, {name: torch.argsort(orders[name]) for name in names})


def _elements(block: Block, dim: tuple[Part, ...], chosen: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Old index of each new element of a tensor dimension."""
    pieces, start = [], 0
    for part in dim:
        width = block.width(part, {})
        index = torch.arange(width)
        if part.axis in block.axes:
            nested = block.by_leader(part)
            sizes = [size for _, size in nested]
            copied, grouped, own = (None if leader is None else chosen.get(leader) for leader, _ in nested[:3])
            index = index.view(sizes)
            if own is not None:
                index = index.flatten(1, 2)[:, own.cpu()].view(sizes)
            if grouped is not None:
                index = index[:, grouped.cpu()]
            if copied is not None:
                index = index[copied.cpu()]
        pieces.append(index.flatten() + start)
        start += width
    return torch.cat(pieces)
