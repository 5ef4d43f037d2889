"""Read sub-networks from pliant's files and from those of the original MultiPruner, BlockPruner and Mamba-Shedder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pliant.anatomy import Anatomy, Block
from pliant.elastic import Subnet, validate
from pliant.errors import DataError, SubnetError
from pliant.prune.scan_skip import scan_axis

ATTENTION, MLP = frozenset({"attention"}), frozenset({"mlp", "experts"})  # roles of the blocks that those files name
SCAN = frozenset({"scan"})
_BLOCKS = {
    "pruned_attn_idx": ATTENTION,
    "pruned_mha_idx": ATTENTION,
    "pruned_mlp_idx": MLP,
    "pruned_mamba_block_idx": SCAN,
}
_WIDTHS = {"pruned_attn_width": ATTENTION, "pruned_mlp_width": MLP, "pruned_mlp_channels": MLP}
_SCANS = "pruned_ssm_idx"
_HYMBA = ("pruned_hymba_block_idx", "pruned_self_attn_idx", "pruned_moe_idx")


def read_config(path: str | Path, anatomy: Anatomy) -> Subnet:
    """A sub-network from a file of pliant (``{"skip": [...], "keep": {...}}``), or of the original MultiPruner,
    BlockPruner or Mamba-Shedder code.

    Their files are MultiPruner's ``pruning_config.json`` (``pruned_attn_idx``, ``pruned_mlp_idx``,
    ``pruned_attn_width``, ``pruned_mlp_width``), BlockPruner's removal lists (``{"1": [["mha", 25]], "2": …}``: the
    longest is taken), and that of Mamba-Shedder (``pruned_mamba_block_idx``, ``pruned_ssm_idx``, ``pruned_mha_idx``,
    ``pruned_mlp_idx``, ``pruned_mlp_channels``). Widths count channels after reordering by L1 norm: reorder the model
    first. Mamba-Shedder replaces a removed scan by ``y = x``: :class:`pliant.Cut` does so, too.

    Raises:
        DataError: the file has neither form, or a width is not a whole number of units.
    """
    return parse_config(config_in(path), anatomy, str(path))


def config_in(path: str | Path) -> dict[str, Any]:
    """The contents of a file for :func:`read_config`, not yet interpreted for a model.

    Raises:
        DataError: the file does not hold a JSON object.
    """
    try:
        raw = json.loads(Path(path).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{str(path)!r} is not a pruning configuration: it must be a JSON object")
    return raw


def parse_config(raw: Mapping[str, Any], anatomy: Anatomy, where: str = "the configuration") -> Subnet:
    """:func:`read_config` for the contents of a file."""
    try:
        digits = bool(raw) and all(key.isdigit() for key in raw)
        if {"skip", "keep"} & set(raw):
            subnet = Subnet.from_dict(raw)
        else:
            subnet = _removals(raw, anatomy) if digits else _widths(raw, anatomy)
        validate(subnet, anatomy)
    except SubnetError as error:
        raise DataError(f"{where} does not fit this model: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is not a pruning configuration: {type(error).__name__} {error}") from None
    return subnet


def is_shedders(raw: Any) -> bool:
    """Whether the contents of a file are of the original Mamba-Shedder code and remove scans."""
    return isinstance(raw, Mapping) and bool(raw.get(_SCANS))


def _removals(raw: Mapping[str, Any], anatomy: Anatomy) -> Subnet:
    """BlockPruner: removals by their number; sets are nested, so the longest is the whole run."""
    roles = {"mha": ATTENTION, "mlp": MLP}
    longest = raw[max(raw, key=int)]
    return Subnet().without(*(_block(anatomy, layer, roles[kind]).name for kind, layer in longest))


def _widths(raw: Mapping[str, Any], anatomy: Anatomy) -> Subnet:
    """MultiPruner and Mamba-Shedder: removed blocks and scans by layer, and widths in channels of the others."""
    keys = {*_BLOCKS, *_WIDTHS, _SCANS}
    if hymba := [key for key in _HYMBA if raw.get(key)]:
        raise SubnetError(f"{hymba[0]} removes parts of Hymba, a family that transformers does not have")
    if not keys & set(raw):
        raise ValueError(f"expected one of {', '.join(sorted(keys))}")
    if unknown := sorted(key for key in set(raw) - keys - {*_HYMBA} if key.startswith("pruned_")):
        raise SubnetError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(keys))}")
    subnet = Subnet()
    for index, roles in _BLOCKS.items():
        for layer in raw.get(index) or ():
            subnet = subnet.without(_block(anatomy, layer, roles).name)
    for layer in raw.get(_SCANS) or ():
        block = _block(anatomy, layer, SCAN)
        if (state := scan_axis(block)) is None:
            raise SubnetError(f"{block.name} has no scan that can be removed alone")
        if block.name not in subnet.skip:
            subnet = subnet.keeping(state.name, 0)
    chosen: dict[str, dict[str, int]] = {}
    for widths, roles in _WIDTHS.items():
        for layer, width in (raw.get(widths) or {}).items():
            block = _block(anatomy, layer, roles)
            if len(block.leaders) != 1:
                raise SubnetError(f"{block.name} of this family has {len(block.leaders)} axes to cut, not one width")
            (leader,) = block.leaders
            widest = max(axis.ratio * axis.unit for axis in block.axes.values() if axis.leader == leader.leader)
            units, rest = divmod(_whole(width), widest)
            if rest:
                raise SubnetError(f"width {width} of {block.name} is not a multiple of {widest}")
            if block.name not in subnet.skip:
                chosen.setdefault(leader.name, {})[block.name] = units
                if units != leader.size:
                    subnet = subnet.keeping(leader.name, units)
    for axis, units in chosen.items():
        _check_alike([b for b in anatomy.alive(subnet.skip) if axis in {leader.name for leader in b.leaders}], units)
    return subnet


def _check_alike(sharing: list[Block], units: Mapping[str, int]) -> None:
    """Raise if blocks that share their tensors would keep different widths.

    Arguments:
        sharing: the remaining blocks that share an axis.
        units: block -> units of this axis; a block that is missing keeps all.
    """
    kept = {block.name: units.get(block.name, block.leaders[0].size) for block in sharing}
    first = sharing[0].name
    for other, own in kept.items():
        if own != kept[first]:
            raise SubnetError(
                f"{first} and {other} share their tensors, but would keep {kept[first]} and {own} "
                f"{sharing[0].leaders[0].leader}; give every layer that shares them the same width"
            )


def _block(anatomy: Anatomy, layer: Any, roles: frozenset[str]) -> Block:
    """The only block of a layer that has one of these roles.

    Mamba-Shedder counts the uses of a block that layers share (Zamba2), and not the layers.
    """
    number = _whole(layer)
    blocks = [block for block in anatomy.blocks.values() if block.role in roles]
    if any(block.tied for block in blocks):
        if not 0 <= number < len(blocks):
            raise SubnetError(f"use {layer} of a shared block: this model has {len(blocks)} uses, counted from 0")
        return blocks[number]
    blocks = [block for block in blocks if block.layer == number]
    if len(blocks) != 1:
        raise SubnetError(f"layer {layer} has {len(blocks)} blocks of the role {' or '.join(sorted(roles))}, not one")
    return blocks[0]


def _whole(number: Any) -> int:
    """A whole number, which is text where it is a key of JSON."""
    if isinstance(number, bool | float):
        raise SubnetError(f"layers and widths must be whole numbers, not {number!r}")
    return int(number)
