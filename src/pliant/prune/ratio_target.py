"""The ratio that a pruner has to reach: when it is reached, and the error if it cannot be."""

from __future__ import annotations

import math

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet
from pliant.elastic import ratio as ratio_of
from pliant.errors import RatioError

TOLERANCE = 1e-12  # ratios are rounded quotients of whole numbers


def reached(anatomy: Anatomy, subnet: Subnet, ratio: float) -> bool:
    """Whether ``subnet`` removes at least ``ratio`` of all parameters."""
    return ratio_of(anatomy, subnet) >= ratio - TOLERANCE


def out_of_reach(ratio: float, most: float, removal: str, name: str = "ratio") -> RatioError:
    """The error for a ratio that is too large.

    Arguments:
        most: the largest possible ratio.
        removal: what removes that much, as the subject of a clause.
        name: the setting.
    """
    if most < 1e-4:
        return RatioError(f"{name} {ratio} cannot be reached: {removal} removes nothing; choose another pruner")
    # rounded down, so that the printed ratio can be reached
    return RatioError(
        f"{name} {ratio} cannot be reached: {removal} removes {math.floor(most * 1e4) / 1e4:.4f}; give at most that"
    )
