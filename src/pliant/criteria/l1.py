"""Importance of units, measured by the L1 norm of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pliant.anatomy import Anatomy, layers_of
from pliant.device import total
from pliant.pages import within_limit


def l1_orders(model: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Sort the units of every axis by falling L1 norm of the weights that produce them (MultiPruner, section 3).

    Returns:
        axis name -> old index of each new unit, shape ``(units,)``. Equal units keep their order.
    """
    return by_falling(l1_norms(model, anatomy), anatomy)


def by_falling(sizes: Mapping[str, torch.Tensor], anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Old index of each new unit when the largest comes first; equal units keep their order, and all stay in their
    group."""
    orders = {}
    for name, size in sizes.items():
        groups = anatomy.axes[name].groups
        grouped = size.view(groups, len(size) // groups)
        first = torch.arange(groups).unsqueeze(1) * grouped.shape[1]
        orders[name] = (torch.argsort(grouped, descending=True, stable=True).cpu() + first).flatten()
    return orders


@torch.no_grad()
def l1_norms(model: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """L1 norm of the weights that produce each unit.

    A unit's norm is summed over the matrices whose output it is, in every block that its axis runs through: gate and up
    projections for a channel; query, key and value rows for a key-value group, where key and value rows count once for
    every query head that shares them; the filters of all convolutions that are added up for a channel of a ResNet.

    Returns:
        axis name -> L1 norm of each unit, shape ``(units,)``.
    """
    layers = layers_of(model, anatomy.source)
    norms = {name: torch.zeros(axis.size, dtype=torch.float64) for name, axis in anatomy.axes.items()}
    for block in within_limit(model, anatomy.blocks.values()):
        for weight in block.weights:
            for index, dim in enumerate(weight.dims):
                if weight.reads in (None, index) or not any(part.axis in block.axes for part in dim):
                    continue
                others = [other for other in range(len(weight.dims)) if other != index]
                rows = total(weight.tensor(layers[block.layer]).abs(), others).cpu()
                start = 0
                for part in dim:
                    width = block.width(part, {})
                    axis = block.axes.get(part.axis)
                    leader = None if axis is None else block.axes[axis.leader]
                    if axis is not None and leader is not None and leader.name in norms:
                        shared = max(other.ratio for other in block.axes.values() if other.leader == axis.leader)
                        per_unit = width // max(1, axis.copies * leader.size)
                        own = rows[start : start + width].view(axis.copies, leader.size, per_unit).sum((0, 2))
                        norms[leader.name] += own * (shared // axis.ratio)
                    start += width
    return norms
