"""Per-layer shapes in config.json, in transformers' own vocabulary: ``per_layer_config`` with ``skip``.

A layer that differs from the rest is written as ``{"intermediate_size": 5888}``, a removed block as ``{"skip":
["mlp"]}`` together with a guard. transformers alone ignores ``skip`` and would build the block with random weights;
overriding a key that it reads makes it refuse instead. See :func:`pliant.anatomy.guards`.

Some dense families have per-layer entries of their own. pliant merges its entries into them. ``pliant_dense_layers``
keeps the dense entries, and its presence marks a config that pliant wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from pliant.anatomy import (
    DENSE_LAYERS,
    Anatomy,
    Axis,
    Block,
    anatomy_of,
    blocks_of,
    described_by,
    entries_of,
    global_size,
    guard_keys,
    guards,
    is_cut,
    is_guard,
    known_keys,
    layer_config,
    layer_types_of,
    layers_of,
    plain_config,
    text_config_of,
)
from pliant.architecture import Architecture, shipped
from pliant.checkpoint.shape_record import RECORD, shape_by, write_shapes
from pliant.elastic.activate import slot
from pliant.elastic.extract import remove, shrink
from pliant.errors import ArchitectureError, ArtefactError

_ALLOW = "allow_global_per_layer_attribute_access"


def describe(anatomy: Anatomy, config: Any, built: Mapping[str, int]) -> dict[int, dict[str, Any]]:
    """The ``per_layer_config`` of a cut model: for each layer that differs from the dense one, the keys that differ.

    Arguments:
        built: axis -> dense size, for sizes that the config does not give.
    """
    plain = plain_config(config)
    overrides: dict[int, dict[str, Any]] = {}
    for layer in range(anatomy.depth):
        entry: dict[str, Any] = {}
        dense = layer_config(plain, layer)
        for spec in anatomy.specs(layer):
            block = anatomy.blocks.get(f"layers.{layer}.{spec.kind}")
            if block is None:
                entry.setdefault("skip", []).append(spec.kind)
                entry |= guards(spec, anatomy.architecture, dense)
                continue
            for short, axis in block.axes.items():
                size = anatomy.architecture.axes[short].size
                if axis.config_key and axis.size != (built[short] if short in built else global_size(dense, size)):
                    entry[axis.config_key] = axis.size
        if entry:
            overrides[layer] = entry
    return overrides


def _sizes_built(model: Any, anatomy: Anatomy, config: Any) -> dict[str, int]:
    """Axis -> dense size, for sizes that neither a key nor a formula gives: those of the dense model, which is built on
    the meta device.

    Arguments:
        config: the config of the text decoder; once a cut was written, it holds the sizes.
    """
    axes = {short: anatomy.architecture.axes[short] for block in anatomy.blocks.values() for short in block.axes}
    known = vars(plain_config(config))
    wanted = {short for short, spec in axes.items() if spec.built and spec.config_key not in known}
    if not wanted:
        return {}
    with torch.device("meta"):
        dense = anatomy_of(type(model)(uncut(model.config)[0]))
    return {
        short: axis.size for block in dense.blocks.values() for short, axis in block.axes.items() if short in wanted
    }


def write(model: Any) -> None:
    """Record the shapes of a model's tensors in its config, so that ``save_pretrained`` writes a folder that reloads.

    A plain module has no such config and is left alone.
    """
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        return
    anatomy = anatomy_of(model)
    if anatomy.traced:
        write_shapes(model)
        return
    config = text_config_of(model.config)
    cut_before, dense = is_cut(config), entries_of(plain_config(config))
    built = _sizes_built(model, anatomy, config)
    overrides = describe(anatomy, config, built)
    config.per_layer_config = None
    vars(config).pop(DENSE_LAYERS, None)
    if overrides:
        # transformers reads a key of one layer only if the config has it, so a key of pliant's own must exist
        plain = plain_config(config)
        for axis in {short for block in anatomy.blocks.values() for short in block.axes}:
            spec = anatomy.architecture.axes[axis]
            if spec.config_key and not hasattr(plain, spec.config_key):
                setattr(config, spec.config_key, built[axis] if axis in built else global_size(plain, spec.size))
    if written := {layer: dense.get(layer, {}) | overrides.get(layer, {}) for layer in sorted({*dense, *overrides})}:
        config.per_layer_config = written
    if overrides:
        setattr(config, DENSE_LAYERS, {str(layer): entry for layer, entry in dense.items()})
    known = shipped().get(config.model_type)
    if known is None or anatomy.architecture.raw != known.raw:  # another machine may lack this file
        config.pliant_architecture = dict(anatomy.architecture.raw)
    # a family whose config validates its head count, or whose output head asks for the number of experts, can only be
    # read back if the global value may be read; there the narrower tensors themselves make transformers alone refuse
    reads_global = any(
        (block.spec.scores or block.role == "scan" or axis.active) and axis.config_key in overrides.get(block.layer, {})
        for block in anatomy.blocks.values()
        for axis in block.axes.values()
    )
    if reads_global:
        setattr(config, _ALLOW, True)
        return
    if overrides or cut_before:
        # left over from an earlier cut, it would let transformers alone build the removed blocks
        vars(config).pop(_ALLOW, None)
    if any("skip" in entry for entry in overrides.values()) and isinstance(model, PreTrainedModel):
        _prove_refusal(model)


as_transformers_alone: ContextVar[bool] = ContextVar("as_transformers_alone", default=False)
"""While it is true, models are built as by transformers without pliant."""


def _prove_refusal(model: PreTrainedModel) -> None:
    """Check that transformers alone refuses to build the cut model from its config; it is built on the meta device."""
    token = as_transformers_alone.set(True)
    try:
        with torch.device("meta"):
            type(model)(copy.deepcopy(model.config))
    except AmbiguousGlobalPerLayerAttributeError:
        return
    finally:
        as_transformers_alone.reset(token)
    config = text_config_of(model.config)
    guarded = sorted({key for entry in entries_of(config).values() for key in entry} - {"skip"})
    raise ArchitectureError(
        f"transformers alone would build the blocks that were removed from this {config.model_type} model with random "
        f"weights, because it does not read {', '.join(guarded)}. Name another 'guard' in "
        f"{described_by(config).name}.yaml: a config key that the layer reads when it is built"
    )


def cuts_in(config: Any) -> Iterator[Any]:
    """The configs that describe a cut: the config itself, if it records the shapes of the whole model, and nested
    ones."""
    if getattr(config, RECORD, None):
        yield config
    yield from (part for part in _cut_by_layer(config) if part is not config or not getattr(config, RECORD, None))


def _cut_by_layer(config: Any) -> Iterator[Any]:
    if is_cut(config):
        yield config
    for _, part in _parts(config):
        yield from _cut_by_layer(part)


def uncut(config: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """The dense model's config, with nested configs made dense as well.

    Shape records in nested configs are left alone, because the model of the nested config reads them.

    Returns:
        The dense config, and a list of pairs ``(copy, original)`` of all configs that were copied.
    """
    plain = plain_config(config)
    pairs = [(plain, config)]
    for name, part in _parts(config):
        if any(True for _ in _cut_by_layer(part)):
            dense, further = uncut(part)
            setattr(plain, name, dense)
            pairs += further
    return plain, pairs


def _parts(config: Any) -> Iterator[tuple[str, PreTrainedConfig]]:
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield name, part


def shape_model(model: nn.Module, config: Any) -> None:
    """Cut a freshly built full-size model to the shapes in its config: per layer, or those of a shape record.

    Arguments:
        config: the model's config, or the part of it that describes these layers.

    Raises:
        ArchitectureError: no architecture file describes the family, or the model has no layers at the path in that
            file, for example because its class does not hold them.
        ArtefactError: the config has an unknown entry for a layer.
    """
    if recorded := getattr(config, RECORD, None):
        shape_by(model, recorded)
        return
    architecture = described_by(config)
    _check_entries(config, architecture)
    plain, entries = plain_config(config), list(config.per_layer_config)
    types = layer_types_of(plain, len(entries))
    for index, layer in enumerate(layers_of(model, architecture, config)):
        _shape_layer(layer, index, entries, architecture, plain, types)


def _check_entries(config: Any, architecture: Architecture) -> None:
    """Raise for entries without an effect: unknown keys and blocks, and values that are neither dense ones nor
    guards."""
    plain = plain_config(config)
    dense = entries_of(plain)
    types = layer_types_of(plain, len(config.per_layer_config))
    for layer, entry in entries_of(config).items():
        of_layer = layer_config(plain, layer)
        known = known_keys(architecture, of_layer) | {"skip", *dense.get(layer, ())}
        if unknown := sorted(set(entry) - known):
            raise ArtefactError(
                f"per_layer_config sets {unknown[0]!r} of layer {layer}, which has no effect in a {config.model_type} "
                f"model; allowed are {', '.join(sorted(known))}"
            )
        kinds = [spec.kind for spec in architecture.blocks_of(types[layer])]
        if unknown := sorted(set(entry.get("skip", ())) - {*kinds}):
            raise ArtefactError(
                f"per_layer_config skips {unknown[0]!r} in layer {layer}; a layer of {architecture.name}.yaml has the "
                f"blocks {', '.join(kinds)}"
            )
        removed = [spec for spec in architecture.blocks if spec.kind in entry.get("skip", ())]
        allowed = guard_keys(removed, of_layer)
        sizes = {spec.config_key for spec in architecture.axes.values()}
        for key in sorted(set(entry) - {"skip", *sizes}):
            plainly = dense.get(layer, {}).get(key, getattr(of_layer, key, None))
            value = entry[key]
            if value != plainly and not (key in allowed and is_guard(value, plainly)):
                raise ArtefactError(
                    f"per_layer_config sets {key!r} of layer {layer} to {value!r}, which has no effect; the layer is "
                    f"built with {plainly!r}. Leave the key out"
                )


def _shape_layer(
    layer: nn.Module, index: int, layers: list[Any], architecture: Architecture, plain: Any, types: tuple[str, ...]
) -> None:
    for block in blocks_of(layer, index, architecture, plain, types[index]):
        if block.kind in layers[index].skip:
            remove(layer, block)
            continue
        shrink(layer, block, _kept(block, layers[index], architecture))
        if block.spec.state:
            alive = [
                other
                for other, entry in enumerate(layers)
                for spec in architecture.blocks_of(types[other])
                if spec.state == block.spec.state and spec.kind not in entry.skip
            ]
            setattr(layer.get_submodule(block.spec.module), str(block.spec.slot), slot(index, alive, types))


def _kept(block: Block, config: Any, architecture: Architecture) -> dict[str, int]:
    """The units that the config of one layer keeps of each leading axis.

    Raises:
        ArtefactError: the dense model has fewer, or they are not in equal groups.
    """
    sizes = {axis.leader: _units(config, axis, architecture) for axis in block.leaders}
    kept: dict[str, int] = {}
    for axis in sorted(block.leaders, key=lambda axis: axis.grouped_by is not None):  # groups before their units
        units, dense, in_groups = sizes[axis.leader], axis.size, ""
        if axis.groups > 1:
            groups = kept.get(str(axis.grouped_by), axis.groups)
            dense, in_groups = axis.size // axis.groups * groups, f" in these {groups} groups"
            if units % groups:
                raise ArtefactError(
                    f"per_layer_config gives {block.name} {units} {axis.leader} in {groups} groups; every group keeps "
                    f"equally many, so it must be a multiple of {groups}"
                )
            kept[axis.leader] = units // groups * axis.groups
        else:
            kept[axis.leader] = units
        if not min(1, axis.least) <= units <= dense:
            raise ArtefactError(
                f"per_layer_config gives {block.name} {units} {axis.leader}; the dense model has {dense}{in_groups}, "
                f"so it must be between {min(1, axis.least)} and {dense}"
            )
    return kept


def _units(config: Any, axis: Axis, architecture: Architecture) -> int:
    """The units of an axis that the config of one layer asks for."""
    spec = architecture.axes[axis.leader]
    if spec.built and not hasattr(config, str(spec.config_key)):  # no layer was cut along this axis
        return axis.size
    return global_size(config, spec.size)
