"""Targets: the names of what can be removed from a state-space model or a hybrid, and their moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pliant.anatomy import Anatomy, Axis
from pliant.elastic import Subnet
from pliant.errors import StepError
from pliant.prune.moves import Moves, axis_moves, block_moves, scan_moves

_MLP = ("mlp", "experts")
PARTS = {
    "channels": "MLP channels",
    "heads": "scan heads",
    "state": "a scan with a state that can shrink",
    "groups": "scan heads in groups",
    "scan_channels": "scan channels, which Mamba-1 has in place of heads",
}
WHOLE = {
    "ssm": "a scan of which a skip alone can remain",
    "block": "a block with a scan that may be removed",
    "attention": "an attention block that may be removed",
    "mlp": "an MLP that may be removed",
}
TARGETS = {**PARTS, **WHOLE}
"""Target, the finest first -> what a model needs for it."""
_ROLES = {"block": {"scan"}, "attention": {"attention"}, "mlp": set(_MLP)}


def targets_of(text: str) -> tuple[str, ...]:
    """The targets in a text such as ``block+attention``.

    Raises:
        StepError: one of them is unknown.
    """
    names = tuple(name.strip() for name in text.split("+"))
    for name in names:
        if name not in TARGETS:
            raise StepError(f"unknown target {name!r}; choose from: {', '.join(TARGETS)}, joined by '+'")
    return names


def roles_of(targets: Sequence[str]) -> set[str]:
    """The roles of the blocks that these targets remove whole; of no target: of all that :func:`moves_of` takes."""
    return set().union(*(_ROLES.get(target, set()) for target in targets or WHOLE))


def axes_of(anatomy: Anatomy, target: str) -> list[Axis]:
    """The axes that a target of ``PARTS`` narrows, by the roles of blocks and the widths of units."""
    found = {}
    for block in anatomy.blocks.values():
        spanning = {block.axes[name].leader for name in block.spec.scan_state if name in block.axes}
        for axis in block.leaders:
            named = {
                "state": axis == block.state_axis,
                "heads": axis.leader in spanning and axis != block.state_axis and axis.unit > 1,
                "scan_channels": axis.leader in spanning and axis != block.state_axis and axis.unit == 1,
                "groups": block.role == "scan" and axis.grouping,
                "channels": block.role in _MLP and axis.unit == 1 and axis.active is None,
            }
            if named[target] and axis.size:
                found[axis.name] = axis
    return list(found.values())


def moves_of(
    anatomy: Anatomy, targets: Sequence[str], groups: Mapping[str, Mapping[str, int]], model: str
) -> list[Moves]:
    """The moves of every target, the finest first; of no target: of all that the model has of ``WHOLE``.

    Arguments:
        groups: target of ``PARTS`` -> full name of an axis -> units removed in one move.
        model: names the model in messages.

    Raises:
        StepError: the model does not have what a target names.
    """
    kinds = {target: axis_moves(anatomy, groups[target]) for target in PARTS}
    kinds |= {"ssm": scan_moves(anatomy)} | {target: block_moves(anatomy, _ROLES[target]) for target in _ROLES}
    possible = [target for target in TARGETS if kinds[target](Subnet())]
    for target in targets:
        if target not in possible:
            raise StepError(
                f"target {target!r} needs {TARGETS[target]}, and {model} has none; choose from: {', '.join(possible)}"
            )
    if not (chosen := [target for target in possible if target in (targets or WHOLE)]):
        raise StepError(f"{model} has no block or scan that may be removed")
    return [kinds[target] for target in chosen]
