"""Sub-networks that were found before: from our files, and from those of the original MultiPruner and BlockPruner code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet, validate
from pliant.errors import DataError, SubnetError


def read_config(path: str | Path, anatomy: Anatomy) -> Subnet:
    """A sub-network from a file: ours (``{"skip": [...], "keep": {...}}``), or what the original MultiPruner or BlockPruner
    code found.

    Of those it understands ``pruning_config.json`` of MultiPruner (``pruned_attn_idx``, ``pruned_mlp_idx``, ``pruned_attn_width``,
    ``pruned_mlp_width``) and the removal lists of BlockPruner (``{"1": [["mha", 25]], "2": …}``: the longest is taken).
    MultiPruner's widths count channels after reordering by L1 norm: reorder the model first.

    Raises:
        DataError: neither form, or a width that is no whole number of units.
    """
    return parse_config(config_in(path), anatomy, str(path))


def config_in(path: str | Path) -> dict[str, Any]:
    """What a file of :func:`read_config` holds, not yet read for any model.

    Raises:
        DataError: no object in JSON.
    """
    try:
        raw = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{str(path)!r} is no pruning configuration: an object is expected")
    return raw


def parse_config(raw: Mapping[str, Any], anatomy: Anatomy, where: str = "the configuration") -> Subnet:
    """:func:`read_config` for what is already read."""
    try:
        digits = bool(raw) and all(key.isdigit() for key in raw)
        if {"skip", "keep"} & set(raw):
            subnet = Subnet.from_dict(raw)
        else:
            subnet = _removals(raw) if digits else _widths(raw, anatomy)
        validate(subnet, anatomy)
    except SubnetError as error:
        raise DataError(f"{where} does not fit this model: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is no pruning configuration: {type(error).__name__} {error}") from None
    return subnet


def _removals(raw: Mapping[str, Any]) -> Subnet:
    """BlockPruner: removals by their number; sets are nested, so the longest is the whole run."""
    kinds = {"mha": "attention", "mlp": "mlp"}
    longest = raw[max(raw, key=int)]
    return Subnet(frozenset(f"layers.{int(layer)}.{kinds[kind]}" for kind, layer in longest))


def _widths(raw: Mapping[str, Any], anatomy: Anatomy) -> Subnet:
    """MultiPruner: removed layers of each kind, and widths in channels of those that stay."""
    keys = {"pruned_attn_idx", "pruned_mlp_idx", "pruned_attn_width", "pruned_mlp_width"}
    if not keys & set(raw):
        raise ValueError(f"expected are {', '.join(sorted(keys))}")
    subnet = Subnet()
    for kind, index in (("attention", "pruned_attn_idx"), ("mlp", "pruned_mlp_idx")):
        for layer in raw.get(index) or ():
            subnet = subnet.without(f"layers.{int(layer)}.{kind}")
    for kind, widths in (("attention", "pruned_attn_width"), ("mlp", "pruned_mlp_width")):
        for layer, width in (raw.get(widths) or {}).items():
            block = anatomy.blocks.get(f"layers.{int(layer)}.{kind}")
            if block is None:
                raise SubnetError(f"it narrows {kind} of layer {layer}, which is not there")
            if len(block.leaders) != 1:
                raise SubnetError(f"{block.name} of this family has {len(block.leaders)} axes to cut, not one width")
            (leader,) = block.leaders
            widest = max(axis.ratio * axis.unit for axis in block.axes.values() if axis.leader == leader.leader)
            units, left = divmod(int(width), widest)
            if left:
                raise SubnetError(f"width {width} of {block.name} is no multiple of {widest}")
            if block.name not in subnet.skip and units != leader.size:
                subnet = subnet.keeping(leader.name, units)
    return subnet
