"""Per-layer shapes in config.json, in transformers' own vocabulary: ``per_layer_config`` with ``skip``.

A layer that differs from the rest is written as ``{"intermediate_size": 5888}``; a removed block as ``{"skip": ["mlp"]}``
together with zero for its axes, or for the key that the architecture file names. The zero is a guard: transformers alone
reads ``skip`` nowhere and would build the block with random weights; an override of what it reads makes it refuse instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from pliant.anatomy import Anatomy, anatomy_of, blocks_of, described_by, global_size, layers_of, plain_config
from pliant.architecture import Architecture, shipped
from pliant.checkpoint.shapes import RECORD, shape_by, write_shapes
from pliant.elastic.activate import slot
from pliant.elastic.extract import remove, shrink
from pliant.errors import ArchitectureError


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
                keys = {anatomy.architecture.axes[leader].config_key for leader in anatomy.architecture.leaders(spec)}
                guards = [spec.guard] if spec.guard else sorted(key for key in keys if key)
                entry |= {key: 0.0 if isinstance(getattr(plain, key), float) else 0 for key in guards}
                continue
            for short, axis in block.axes.items():
                if axis.config_key and axis.size != global_size(plain, anatomy.architecture.axes[short].size):
                    entry[axis.config_key] = axis.size
        if entry:
            overrides[layer] = entry
    return overrides


def write(model: Any) -> None:
    """Make a model's config say what its tensors are, so that ``save_pretrained`` writes a folder that reloads.

    A plain module has no such config and nothing that would read one.
    """
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        return
    anatomy = anatomy_of(model)
    if anatomy.traced:
        write_shapes(model)
        return
    config = model.config.get_text_config(decoder=True)
    overrides = describe(anatomy, config)
    config.per_layer_config = overrides or None
    if anatomy.architecture != shipped().get(config.model_type):  # elsewhere nobody may have added it
        config.pliant_architecture = dict(anatomy.architecture.raw)
    # families whose config validates its head count, or whose head on top asks for the number of experts, can only be
    # read back with leave to look at the global value; there the narrower tensors themselves make transformers alone refuse
    asked_for = any(
        (block.spec.scores or axis.active) and axis.config_key in overrides.get(block.layer, {})
        for block in anatomy.blocks.values()
        for axis in block.axes.values()
    )
    if asked_for:
        config.allow_global_per_layer_attribute_access = True
    else:  # left over from an earlier cut, it would let transformers alone build what is gone by now
        vars(config).pop("allow_global_per_layer_attribute_access", None)


def shape_model(model: nn.Module, config: Any) -> None:
    """Cut the full-size layers of a model, fresh from its constructor, to what ``config.per_layer_config`` says; or, where
    the config has a record of shapes, the whole model to that.

    A model without a list of layers is left alone: it is one that holds another.
    """
    if recorded := getattr(config, RECORD, None):
        shape_by(model, recorded)
        return
    architecture = described_by(config)
    try:
        layers = layers_of(model, architecture)
    except ArchitectureError:
        return
    for index, layer in enumerate(layers):
        _shape_layer(layer, index, config, architecture)


def _shape_layer(layer: nn.Module, index: int, config: Any, architecture: Architecture) -> None:
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
