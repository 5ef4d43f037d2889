"""Subnet: one frozen value that says how much of a model is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pliant.anatomy import Anatomy, Block
from pliant.errors import SubnetError


@dataclass(frozen=True)
class Subnet:
    """How much of each axis is kept and which blocks are skipped. ``Subnet()`` is the dense model.

    Attributes:
        skip: names of the blocks that are removed, e.g. ``layers.3.attention``.
        keep: (axis name, units kept), sorted; axes left out are full. Kept units are always the first ones.
    """

    skip: frozenset[str] = frozenset()
    keep: tuple[tuple[str, int], ...] = ()

    def without(self, *blocks: str) -> Subnet:
        """This sub-network with more blocks removed; the kept units of axes inside them are dropped."""
        inside = tuple(f"{block}." for block in blocks)
        keep = tuple((axis, units) for axis, units in self.keep if not axis.startswith(inside))
        return Subnet(self.skip | set(blocks), keep)

    def keeping(self, axis: str, units: int) -> Subnet:
        """This sub-network with ``units`` units of one axis."""
        return Subnet(self.skip, tuple(sorted({**dict(self.keep), axis: units}.items())))

    def kept(self, block: Block) -> dict[str, int]:
        """Units kept of each leading axis of a block, by short name."""
        chosen = dict(self.keep)
        return {axis.leader: chosen.get(axis.name, axis.size) for axis in block.leaders}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: ``{"skip": [...], "keep": {axis: units}}``."""
        return {"skip": sorted(self.skip), "keep": dict(self.keep)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Subnet:
        """The inverse of :meth:`to_dict`.

        Raises:
            SubnetError: ``raw`` has another form.
        """
        skip, keep = raw.get("skip", []), raw.get("keep", {})
        if set(raw) - {"skip", "keep"} or not isinstance(skip, Iterable) or not isinstance(keep, Mapping):
            raise SubnetError(f"a sub-network must be {{'skip': [blocks], 'keep': {{axis: units}}}}, not {raw!r}")
        for axis, units in keep.items():
            if type(units) is not int:
                raise SubnetError(f"the number of units that {axis} keeps must be a whole number, not {units!r}")
        return cls(frozenset(skip), tuple(sorted((str(axis), units) for axis, units in keep.items())))

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))


def validate(subnet: Subnet, anatomy: Anatomy, *, stretch: bool = False) -> None:
    """Raise if a sub-network does not fit the model.

    Arguments:
        stretch: only a stretch of layers will run, so all attention may be skipped.

    Raises:
        SubnetError: a name is unknown, an axis does not allow the kept units, a block is needed, or no block of a layer
            type that keeps a state remains.
    """
    unknown = sorted(subnet.skip - set(anatomy.blocks))
    if unknown:
        raise SubnetError(f"the model has no block {unknown[0]!r}; its blocks are {_some(anatomy.blocks)}")
    needed = sorted(name for name in subnet.skip if not anatomy.blocks[name].removable)
    if needed:
        raise SubnetError(f"{needed[0]} cannot be removed, only made narrower: the model needs it")
    axes = anatomy.axes
    removed = tuple(f"{block}." for block in subnet.skip)
    for name, units in subnet.keep:
        if name not in axes:
            block, _, axis = name.rpartition(".")
            if block in anatomy.blocks and (known := anatomy.blocks[block].axes.get(axis)) is not None:
                leader = anatomy.blocks[block].axes[known.leader].name
                if known.leader != axis and leader in axes:
                    raise SubnetError(f"{name} follows another axis; choose {leader!r} instead")
                if leader in axes:
                    raise SubnetError(
                        f"{block} shares its tensors with other layers, so all of them are cut alike: choose "
                        f"{leader!r} instead of {name!r}"
                    )
            raise SubnetError(f"the model has no axis {name!r} to choose; its axes are {_some(axes)}")
        axis = axes[name]
        if not axis.allows(units):
            steps = f" in multiples of {axis.multiple}" if axis.multiple > 1 else ""
            raise SubnetError(
                f"{name} can keep {axis.fewest} to {axis.size} units{steps}, not {units}; to keep none, skip the block"
            )
        if name.startswith(removed):
            raise SubnetError(f"{name} is kept at {units}, but its block is skipped; leave out one of the two")
    if not stretch:
        remaining = anatomy.holders(subnet.skip)
        for key, blocks in anatomy.holders().items():
            if key not in remaining:
                raise SubnetError(
                    f"every {blocks[0].kind} block of the {key[1]} layers would be removed; at least one must stay, "
                    "because the model counts the tokens it has seen there"
                )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f", … ({len(listed)} in all)" if len(listed) > 4 else "")
