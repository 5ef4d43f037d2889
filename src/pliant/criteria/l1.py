"""Importance of units, measured by the L1 norm of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pliant.anatomy import Anatomy, Axis, Block, layers_of
from pliant.criteria.unit_readers import sums
from pliant.device import total
from pliant.pages import within_limit


def l1_orders(model: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Sort the units of every axis by falling L1 norm of the weights that produce them (MultiPruner, section 3).

    Returns:
        axis name -> old index of each new unit, shape ``axis.shape``. Equal units keep their order.
    """
    return by_falling(l1_norms(model, anatomy), anatomy)


def by_falling(sizes: Mapping[str, torch.Tensor], anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Old index of each new unit when the largest comes first; equal units keep their order, and all stay in their
    group. Copies are sorted one by one if there is a size for each."""
    orders = {}
    for name, size in sizes.items():
        groups = anatomy.axes[name].groups
        in_group = size.shape[-1] // groups
        grouped = size.unflatten(-1, (groups, in_group))
        first = torch.arange(groups).unsqueeze(1) * in_group
        orders[name] = (torch.argsort(grouped, descending=True, stable=True).cpu() + first).flatten(-2)
    return orders


@torch.no_grad()
def l1_norms(model: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """L1 norm of the weights that produce each unit.

    A unit's norm is summed over the matrices whose output it is, in every block that its axis runs through: gate and up
    projections for a channel; query, key and value rows for a key-value group, where key and value rows count once for
    every query head that shares them; the filters of all convolutions that are added up for a channel of a ResNet. A
    unit that is a group of other units has their norm, too.

    Returns:
        axis name -> L1 norm of each unit, shape ``axis.shape``.
    """
    layers = layers_of(model, anatomy.source)
    norms = {name: torch.zeros(axis.shape, dtype=torch.float64) for name, axis in anatomy.axes.items()}
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
                    for leader, per_unit in sums(block, part, rows[start : start + width]):
                        if leader.name in norms:
                            members = [_members(block, axis, leader) for axis in block.axes.values()]
                            shared = max(members) // _members(block, block.axes[part.axis], leader)
                            norms[leader.name] += per_unit * shared
                    start += width
    return norms


def _members(block: Block, axis: Axis, leader: Axis) -> int:
    """Units of an axis that belong to one unit of a leading one; 1 if they belong to none."""
    if block.axes[axis.leader] is leader:
        return axis.ratio
    grouped = axis.grouped_by is not None and block.axes[axis.grouped_by] is leader
    return axis.size // max(1, leader.size) if grouped else 1
