"""Read sub-networks from pliant's files and from those of the original MultiPruner and BlockPruner code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pliant.anatomy import Anatomy, Block
from pliant.elastic import Subnet, validate
from pliant.errors import DataError, SubnetError

ATTENTION, MLP = frozenset({"attention"}), frozenset({"mlp", "experts"})  # roles of the blocks that those files name


def read_config(path: str | Path, anatomy: Anatomy) -> Subnet:
    """A sub-network from a file of pliant (``{"skip": [...], "keep": {...}}``), or of the original MultiPruner or
    BlockPruner code.

    Their files are MultiPruner's ``pruning_config.json`` (``pruned_attn_idx``, ``pruned_mlp_idx``,
    ``pruned_attn_width``, ``pruned_mlp_width``) and BlockPruner's removal lists (``{"1": [["mha", 25]], "2": …}``: the
    longest is taken). MultiPruner's widths count channels after reordering by L1 norm: reorder the model first.

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


def _removals(raw: Mapping[str, Any], anatomy: Anatomy) -> Subnet:
    """BlockPruner: removals by their number; sets are nested, so the longest is the whole run."""
    roles = {"mha": ATTENTION, "mlp": MLP}
    longest = raw[max(raw, key=int)]
    return Subnet().without(*(_block(anatomy, layer, roles[kind]).name for kind, layer in longest))


def _widths(raw: Mapping[str, Any], anatomy: Anatomy) -> Subnet:
    """MultiPruner: removed attentions and MLPs by layer, and widths in channels of the others."""
    keys = {"pruned_attn_idx", "pruned_mlp_idx", "pruned_attn_width", "pruned_mlp_width"}
    if not keys & set(raw):
        raise ValueError(f"expected one of {', '.join(sorted(keys))}")
    subnet = Subnet()
    for roles, index in ((ATTENTION, "pruned_attn_idx"), (MLP, "pruned_mlp_idx")):
        for layer in raw.get(index) or ():
            subnet = subnet.without(_block(anatomy, layer, roles).name)
    chosen: dict[str, dict[str, int]] = {}
    for roles, widths in ((ATTENTION, "pruned_attn_width"), (MLP, "pruned_mlp_width")):
        for layer, width in (raw.get(widths) or {}).items():
            block = _block(anatomy, layer, roles)
            if len(block.leaders) != 1:
                raise SubnetError(f"{block.name} of this family has {len(block.leaders)} axes to cut, not one width")
            (leader,) = block.leaders
            widest = max(axis.ratio * axis.unit for axis in block.axes.values() if axis.leader == leader.leader)
            units, rest = divmod(int(width), widest)
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
    """The only block of a layer that has one of these roles."""
    blocks = [block for block in anatomy.blocks.values() if block.layer == int(layer) and block.role in roles]
    if len(blocks) != 1:
        raise SubnetError(f"layer {layer} has {len(blocks)} blocks of the role {' or '.join(sorted(roles))}, not one")
    return blocks[0]
