"""Which units matter, read from the size of their weights."""

from __future__ import annotations

import torch
from torch import nn

from pliant.anatomy import Anatomy, layers_of


@torch.no_grad()
def l1_orders(model: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Units of every axis by falling L1 norm of the weights that produce them (MultiPruner, section 3; LLM-Adapters' L1).

    A unit's norm is summed over the matrices whose output it is: gate and up projections for a channel; query, key and
    value rows for a key-value group, where key and value rows count once for every query head that shares them.

    Returns:
        axis name -> old index of each new unit, shape ``(units,)``. Equal units keep their order.
    """
    layers = layers_of(model, anatomy.architecture)
    orders = {}
    for block in anatomy.blocks.values():
        for leader in block.leaders:
            shared = max(axis.ratio for axis in block.axes.values() if axis.leader == leader.leader)
            norms = torch.zeros(leader.size, dtype=torch.float64)
            for weight in block.weights:
                if weight.reads is None:
                    continue
                output = 1 - weight.reads
                start = 0
                rows = layers[block.layer].get_parameter(weight.path).abs().sum(weight.reads, dtype=torch.float64).cpu()
                for part in weight.dims[output]:
                    width = block.width(part, {})
                    axis = block.axes.get(part.axis)
                    if axis is not None and axis.leader == leader.leader:
                        norms += rows[start : start + width].view(leader.size, -1).sum(1) * (shared // axis.ratio)
                    start += width
            orders[leader.name] = torch.argsort(norms, descending=True, stable=True)
    return orders
