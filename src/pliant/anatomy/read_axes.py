"""Read the axes of one block from its tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from math import lcm
from typing import Any

from torch import nn

from pliant.anatomy.block import Attribute, Axis, Weight
from pliant.anatomy.config import global_size
from pliant.architecture import Architecture, BlockSpec, Part
from pliant.architecture.format import EMPTY_STATE
from pliant.errors import ArchitectureError


def read_axes(
    layer: nn.Module,
    spec: BlockSpec,
    architecture: Architecture,
    plain: Any,
    name: str,
    weights: list[Weight],
    attributes: list[Attribute],
    fixed: Mapping[str, int],
) -> dict[str, Axis]:
    """Read the sizes of a block's axes from its tensors, because the layers of a pruned model differ."""
    axes: dict[str, Axis] = {}
    used = {part.axis for weight in weights for dim in weight.dims for part in dim}
    leaders = {architecture.leader(axis) for axis in used if axis in architecture.axes}
    for named in {named for axis in used if axis in architecture.axes for named in architecture.named_by(axis)}:
        if named not in leaders:
            axes[named] = _read_from_attribute(layer, named, architecture, name, attributes)
    pending = [leader for leader in architecture.leaders(spec) if leader in leaders]
    floor = 1 if spec.role == "scan" and not _runs_without_state(layer) else 0
    least = {leader: max(floor, architecture.axes[leader].least) for leader in pending}
    while pending:
        # a dimension may consist of several axes: the size of one follows once the others are known
        sized = None
        for alone in (True, False):
            for leader in pending:
                known = {} if alone else {**axes, **fixed}
                sized = sized or _read_family(
                    layer, leader, architecture, plain, name, weights, axes, known, least[leader]
                )
        if sized is None:
            raise ArchitectureError(f"{name}: no dimension of any weight determines the size of axis {pending[0]!r}")
        axes |= sized
        pending = [leader for leader in pending if leader not in axes]
    overlap = set(axes) & set(fixed)
    if overlap:
        raise ArchitectureError(f"{name}: {sorted(overlap)} are declared both as axes and as fixed")
    return {short: _in_groups(axis, short, architecture, plain, axes) for short, axis in axes.items()}


def _read_from_attribute(
    layer: nn.Module, short: str, architecture: Architecture, name: str, attributes: list[Attribute]
) -> Axis:
    """An axis that no weight has, because its units are groups of others; an attribute holds their number."""
    for attribute in attributes:
        if attribute.parts == (Part(short),) and attribute.measure == "units":
            size = getattr(layer.get_submodule(attribute.path), attribute.name, None)
            if isinstance(size, int) and size > 0:
                spec = architecture.axes[short]
                return Axis(
                    name=f"{name}.{short}",
                    size=size,
                    unit=1,
                    leader=short,
                    ratio=1,
                    config_key=spec.config_key,
                    cut=spec.cut,
                    multiple=spec.multiple,
                    normed=spec.normed,
                    least=spec.least,
                )
    raise ArchitectureError(
        f"{name}: no weight has the axis {short!r}, and no attribute holds its number of units; list the one that does "
        f"under 'attributes' in {architecture.name}.yaml"
    )


def _in_groups(axis: Axis, short: str, architecture: Architecture, plain: Any, axes: Mapping[str, Axis]) -> Axis:
    """An axis whose size is known, with its groups, and whether its units are those of others."""
    given = architecture.axes[axis.leader].groups
    by = str(given) if given in architecture.axes else None
    groups = global_size(plain, given) if by is None else axes[by].size
    if axis.size % groups:
        raise ArchitectureError(f"{axis.name}: {axis.size} {short} are not in {groups} equal groups")
    grouping = any(short in architecture.named_by(other) for other in axes)
    return replace(axis, groups=groups, grouped_by=by, multiple=lcm(groups, axis.multiple), grouping=grouping)


def _read_family(
    layer: nn.Module,
    leader: str,
    architecture: Architecture,
    plain: Any,
    name: str,
    weights: list[Weight],
    axes: Mapping[str, Axis],
    known: Mapping[str, Axis | int],
    least: int,
) -> dict[str, Axis] | None:
    """Read a leading axis and its followers from the first dimension that consists of them and of ``known`` axes.

    Arguments:
        axes: the axes that have been read.
        known: axes, and sizes of fixed dimensions.
        least: the fewest units that can stay.

    Returns:
        Short name -> axis; None if no dimension is of this kind.
    """
    family = [leader, *(n for n, a in architecture.axes.items() if a.follows == leader)]
    # an axis whose size only a built layer shows has no followers, so that only the ratio of 1 is needed
    sizes = {n: 1 if (axis := architecture.axes[n]).built else global_size(plain, axis.size) for n in family}
    wide = {member: global_size(plain, architecture.axes[member].unit) for member in family}
    ratios = {member: sizes[member] // sizes[leader] if sizes[leader] else 1 for member in family}
    given = {member: architecture.axes[member].copies for member in family}
    copied_by = {member: str(named) if named in architecture.axes else None for member, named in given.items()}
    if any(named is not None and named not in axes for named in copied_by.values()):
        return None
    copies = {
        member: global_size(plain, given[member]) if named is None else axes[named].size
        for member, named in copied_by.items()
    }

    size = (
        sizes[leader]
        if _gone(leader, architecture, axes)
        else _size(
            layer,
            leader,
            architecture,
            name,
            weights,
            axes,
            known,
            {m: ratios[m] * wide[m] * copies[m] for m in family},
        )
    )
    if size is None:
        return None
    if size < min(1, least):
        raise ArchitectureError(f"{name} has no units of {leader!r}; at least {least} must be there")
    return {
        member: Axis(
            name=f"{name}.{member}",
            size=ratios[member] * size,
            unit=wide[member],
            leader=leader,
            ratio=ratios[member],
            config_key=architecture.axes[member].config_key,
            cut=architecture.axes[leader].cut,
            active=None if (key := architecture.axes[member].active) is None else global_size(plain, key),
            multiple=architecture.axes[leader].multiple,
            normed=architecture.axes[leader].normed,
            least=least,
            copies=copies[member],
            copied_by=copied_by[member],
            only_with=architecture.axes[member].only_with,
        )
        for member in family
    }


def _size(
    layer: nn.Module,
    leader: str,
    architecture: Architecture,
    name: str,
    weights: list[Weight],
    axes: Mapping[str, Axis],
    known: Mapping[str, Axis | int],
    wide: Mapping[str, int],
) -> int | None:
    """The units of a leading axis by the first dimension that consists of its family and of ``known`` axes; None if
    there is none.

    Arguments:
        wide: member of the family -> its elements for each unit of the leader.
    """

    def width(part: Part) -> int:
        axis = known[part.axis]
        if isinstance(axis, int):
            return part.factor * axis
        return 0 if _gone(part.axis, architecture, axes) else part.factor * axis.size * axis.unit * axis.copies

    for weight in weights:
        for position, dim in enumerate(weight.dims):
            others = [part for part in dim if part.axis not in wide]
            waits = any(_waits(part.axis, architecture, axes) for part in dim)
            if waits or any(part.axis not in known for part in others):
                continue
            own = (part for part in dim if part.axis in wide and not _gone(part.axis, architecture, axes))
            if not (per_unit := sum(wide[part.axis] * part.factor for part in own)):
                continue
            length = weight.tensor(layer).shape[position] - sum(map(width, others))
            size, remainder = divmod(length, per_unit)
            if remainder or size < 0:
                raise ArchitectureError(
                    f"{name}: dimension {position} of {weight.path} has {length} elements of {leader!r}; it must have "
                    f"a multiple of {per_unit}, the width of one unit"
                )
            return size
    return None


def _waits(short: str, architecture: Architecture, axes: Mapping[str, Axis]) -> bool:
    """Whether an axis depends on one that has not been read yet."""
    by = architecture.axes[short].only_with if short in architecture.axes else None
    return by is not None and by not in axes


def _gone(short: str, architecture: Architecture, axes: Mapping[str, Axis]) -> bool:
    """Whether an axis is gone because the one that it depends on has no units."""
    by = architecture.axes[short].only_with if short in architecture.axes else None
    return by is not None and by in axes and axes[by].size == 0


def _runs_without_state(layer: nn.Module) -> bool:
    """Whether the scan of a layer runs with a state of size 0: pliant has replaced the one of transformers, if it is a
    function. For a module that transformers does not bring, its architecture file decides."""
    if not type(layer).__module__.startswith("transformers."):
        return True
    functions = vars(sys.modules[type(layer).__module__]).values()
    return any(getattr(function, EMPTY_STATE, False) for function in functions)
