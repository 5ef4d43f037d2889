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
        orders: axis name -> the old index of each new unit, shape ``(units,)``; or ``(copies, units)``, an order for
            each copy of an axis that has several. Axes that follow are reordered, too. If the groups or copies of an
            axis are also reordered, its own order counts in the old ones.

    Raises:
        SubnetError: an axis is unknown, or its order is not a permutation within its groups.
    """
    layers = layers_of(model, anatomy.source)
    axes = anatomy.axes
    for name, order in orders.items():
        if name not in axes:
            raise SubnetError(f"the model has no axis {name!r} to reorder; anatomy_of(model).axes lists them")
        axis, units = axes[name], torch.arange(axes[name].size)
        if order.shape not in (units.shape, axis.shape) or (order.cpu().sort(-1).values != units).any():
            raise SubnetError(f"the order given for {name} is not a permutation of {axis.size} units")
        in_group = max(1, axis.size // axis.groups)
        if (order.cpu() // in_group != units // in_group).any():
            raise SubnetError(f"the order given for {name} moves units into another of its {axis.groups} groups")
    for block, first in counted_once(anatomy.blocks.values()):
        chosen = {axis.leader: orders[axis.name] for axis in block.leaders if axis.name in orders}
        if not chosen:
            continue
        # the tied tensors have been reordered with the first block that holds them
        for weight in within_limit(model, [weight for weight in block.weights if first or not weight.tied]):
            parameter = weight.tensor(layers[block.layer])
            for position, dim in enumerate(weight.dims):
                if not block.leaders_of(dim).isdisjoint(chosen):
                    index = _elements(block, dim, chosen).to(parameter.device)
                    parameter.copy_(parameter.index_select(position, index))


def restore(model: nn.Module, anatomy: Anatomy, orders: Mapping[str, torch.Tensor]) -> None:
    """Undo :func:`reorder`."""
    grouping = {name for name, axis in anatomy.axes.items() if axis.grouping}
    for names in (orders.keys() & grouping, orders.keys() - grouping):  # groups first: orders count in the old ones
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
                elements = index.flatten(1, 2)  # of each unit of each copy
                order = own.cpu().expand(elements.shape[:2]).unsqueeze(-1).expand_as(elements)
                index = elements.gather(1, order).view(sizes)
            if grouped is not None:
                index = index[:, grouped.cpu()]
            if copied is not None:
                index = index[copied.cpu()]
        pieces.append(index.flatten() + start)
        start += width
    return torch.cat(pieces)
