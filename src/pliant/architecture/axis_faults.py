"""Check that the axes of an architecture file fit each other."""

from __future__ import annotations

from collections.abc import Mapping

from pliant.architecture.format import BUILT, AxisSpec


def axis_faults(axes: Mapping[str, AxisSpec]) -> list[str]:
    """A sentence for every axis that does not fit the axes that it names."""
    faults: list[str] = []
    for axis, spec in axes.items():
        if spec.follows is not None and (
            not isinstance(spec.follows, str) or spec.follows not in axes or axes[spec.follows].follows
        ):
            faults.append(
                f"axis {axis!r} follows {spec.follows!r}; it must follow a declared axis that follows no other"
            )
        leader = axes.get(str(spec.follows), spec)
        if leader.copies not in (1, spec.copies):
            faults.append(
                f"axis {axis!r} follows {spec.follows!r}, each copy of which is sorted by itself; it must have the "
                f"same copies: {leader.copies!r}"
            )
        in_family = spec.follows or any(other.follows == axis for other in axes.values())
        if spec.built and (in_family or spec.size != f"{spec.config_key} or {BUILT}"):
            faults.append(
                f"axis {axis!r}: {BUILT!r} must come after a key of pliant's own, as in 'mlp_size or {BUILT}', and "
                "such an axis neither follows another nor is followed"
            )
        other = axes.get(str(spec.only_with))
        if spec.only_with is not None and (other is None or other.follows or other.least):
            faults.append(
                f"axis {axis!r}: only_with must name an axis that follows no other and has 'least: 0', not "
                f"{spec.only_with!r}"
            )
        for word, named in (("groups", spec.groups), ("copies", spec.copies)):
            other = axes.get(str(named))
            if other and (other.follows or other.least < 1 or (other.groups, other.copies) != (1, 1)):
                faults.append(
                    f"axis {axis!r}: {word} names the axis {named!r}, which must follow no other, have neither "
                    "groups nor copies, and keep at least 1 unit"
                )
    return faults
