"""Cut a sub-network out for good: the views become the model's own, smaller tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pliant.anatomy import Anatomy, Block, anatomy_of, layers_of
from pliant.elastic.activate import follow, narrow, slot, stand_in
from pliant.elastic.subnet import Subnet, validate
from pliant.pages import in_file, within_limit


@torch.no_grad()
def extract(model: nn.Module, anatomy: Anatomy, subnet: Subnet) -> Anatomy:
    """Cut ``model`` down to ``subnet`` in place.

    Returns:
        The anatomy of what is left.
    """
    validate(subnet, anatomy)
    layers = layers_of(model, anatomy.architecture)
    for block in within_limit(model, anatomy.blocks.values()):
        if block.name in subnet.skip:
            remove(layers[block.layer], block)
        else:
            shrink(layers[block.layer], block, subnet.kept(block))
    left = anatomy_of(model)
    slotted = {block.layer: block for block in left.blocks.values() if block.spec.slot}
    for index, block in slotted.items():
        module = layers[index].get_submodule(block.spec.module)
        setattr(module, str(block.spec.slot), slot(index, slotted, left.layer_types))
    return left


def remove(layer: nn.Module, block: Block) -> None:
    """Take a block out of its layer: null module, no norms."""
    for path in (block.spec.module, *block.removed):
        layer.set_submodule(path, stand_in(block, path))


def shrink(layer: nn.Module, block: Block, kept: Mapping[str, int]) -> None:
    """Make the tensors of a block as small as ``kept`` says (their first units stay)."""
    for weight in block.weights:
        full = weight.tensor(layer)
        part = narrow(full, block, weight, kept)
        if part is not full:
            path, _, name = weight.path.rpartition(".")
            own = part.clone(memory_format=torch.contiguous_format)
            if in_file(full):  # the model is larger than memory: what is left of a tensor stays where it was
                own = full.detach().view(-1)[: own.numel()].view(own.shape).copy_(own)
            if not weight.buffer:
                own = nn.Parameter(own, requires_grad=full.requires_grad)
            setattr(layer.get_submodule(path), name, own)
    follow(layer, block, kept)
