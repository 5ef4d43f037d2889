"""Cut a sub-network out for good: the views become the model's own, smaller tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pliant.anatomy import Anatomy, Block, anatomy_of, layers_of
from pliant.elastic.activate import follow, narrow, place_in_cache, stand_in
from pliant.elastic.subnet import Subnet, validate
from pliant.elastic.ties import correct_ties
from pliant.pages import in_file, within_limit


@torch.no_grad()
def extract(model: nn.Module, anatomy: Anatomy, subnet: Subnet) -> Anatomy:
    """Cut ``model`` down to ``subnet`` in place.

    Returns:
        The anatomy of the cut model.
    """
    validate(subnet, anatomy)
    layers = layers_of(model, anatomy.source)
    removed = anatomy.removed_with(subnet.skip)
    if not removed and all(subnet.kept(block) == Subnet().kept(block) for block in anatomy.blocks.values()):
        return anatomy
    shared: dict[str, dict[str, torch.Tensor]] = {}
    for block in within_limit(model, anatomy.blocks.values()):
        layer = layers[block.layer]
        if block.name in removed:
            remove(layer, block)
            continue
        shrink(layer, block, subnet.kept(block), shared.get(block.tied or "", {}))
        if block.tied is not None:
            shared[block.tied] = {weight.path: weight.tensor(layer) for weight in block.weights if weight.tied}
    correct_ties(model)
    cut = anatomy_of(model)
    place_in_cache(layers, cut)
    return cut


def remove(layer: nn.Module, block: Block) -> None:
    """Remove a block from its layer: a null module replaces it, and its norms do nothing."""
    for path in (block.spec.module, *block.removed):
        layer.set_submodule(path, stand_in(block, path, layer.get_submodule(path)))


def shrink(
    layer: nn.Module, block: Block, kept: Mapping[str, int], shared: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Cut the tensors of a block to the kept units, which are their first ones, and drop those that it does not use.

    Arguments:
        shared: path -> tensor, for those that a block tied to it has cut already.
    """
    for path in block.unused:
        layer.set_submodule(path, nn.Identity())
    for weight in block.weights:
        path, _, name = weight.path.rpartition(".")
        if shared and weight.path in shared:
            setattr(layer.get_submodule(path), name, shared[weight.path])
            continue
        full = weight.tensor(layer)
        part = narrow(full, block, weight, kept)
        if part is not full:
            own = part.clone(memory_format=torch.contiguous_format)
            if in_file(full):  # the model is larger than memory: the rest of a tensor stays in its file
                own = full.detach().view(-1)[: own.numel()].view(own.shape).copy_(own)
            if not weight.buffer:
                own = nn.Parameter(own, requires_grad=full.requires_grad)
            setattr(layer.get_submodule(path), name, own)
    follow(layer, block, kept)
