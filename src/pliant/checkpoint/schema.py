"""Per-layer shapes in config.json, in transformers' own vocabulary: ``per_layer_config`` with ``skip``.

A layer that differs from the rest is written as ``{"intermediate_size": 5888}``; a removed block as ``{"skip": ["mlp"]}``
together with zero for its axes. The zero is a guard: transformers alone reads ``skip`` nowhere and would build the block
with random weights; an override of a size makes it refuse instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pliant.anatomy import Anatomy, anatomy_of, blocks_of, global_size, plain_config
from pliant.architecture import Architecture
from pliant.elastic.activate import slot
from pliant.elastic.extract import remove, shrink


def describe(anatomy: Anatomy, config: Any) -> dict[int, dict[str, Any]]:
    """The ``per_layer_config`` of a cut model: for each layer that differs from ``config``, what differs."""
    plain = plain_config(config)
    overrides: dict[int, dict[str, Any]] = {}
    for layer in range(anatomy.depth):
        entry: dict[str, Any] = {}
        for spec in anatomy.architecture.blocks:
            block = anatomy.blocks.get(f"layers.{layer}.{spec.kind}")
            if block is None:
                entry.setdefault("skip", []).append(spec.kind)
                for leader in anatomy.architecture.leaders(spec):
                    entry[anatomy.architecture.axes[leader].config_key] = 0
                continue
            for short, axis in block.axes.items():
                if axis.size != global_size(plain, anatomy.architecture.axes[short].size):
                    entry[axis.config_key] = axis.size
        if entry:
            overrides[layer] = entry
    return overrides


def write(model: Any) -> None:
    """Make a model's config say what its tensors are, so that ``save_pretrained`` writes a folder that reloads."""
    anatomy = anatomy_of(model)
    config = model.config.get_text_config(decoder=True)
    overrides = describe(anatomy, config)
    config.per_layer_config = overrides or None
    # families whose config validates its head count can only be read back with leave to look at the global value;
    # there the narrower tensors themselves make transformers alone refuse
    live_heads = any(
        block.spec.scores and axis.config_key in overrides.get(block.layer, {})
        for block in anatomy.blocks.values()
        for axis in block.axes.values()
    )
    if live_heads:
        config.allow_global_per_layer_attribute_access = True


def shape_layer(layer: nn.Module, index: int, config: Any, architecture: Architecture) -> None:
    """Cut a full-size layer, fresh from its constructor, to what ``config.per_layer_config[index]`` says."""
    layers = list(config.per_layer_config)
    for block in blocks_of(layer, index, architecture, plain_config(config)):
        if block.kind in layers[index].skip:
            remove(layer, block)
            continue
        sizes = {axis.leader: architecture.axes[axis.leader].size for axis in block.leaders}
        shrink(layer, block, {leader: global_size(layers[index], size) for leader, size in sizes.items()})
        if block.spec.slot:
            alive = [other for other, entry in enumerate(layers) if block.kind not in entry.skip]
            types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
            setattr(layer.get_submodule(block.spec.module), block.spec.slot, slot(index, alive, types))
