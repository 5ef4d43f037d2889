"""Results as strict JSON: NaN and infinity are refused, because other programs refuse files that contain them."""

from __future__ import annotations

import json
from typing import Any

from pliant.errors import WeightError


def to_json(found: Any) -> str:
    """Plain data as indented JSON.

    Raises:
        WeightError: a number is not finite; the message gives its path.
    """
    try:
        return json.dumps(found, indent=1, allow_nan=False)
    except ValueError:
        where, value = next(_infinite(found, ""), ("it", "none"))
        raise WeightError(f"{where} is {value}, which is not finite; check the model's weights and the text") from None


def _infinite(found: Any, where: str) -> Any:
    """The path and value of every number that is not finite."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _infinite(value, f"{where}.{key}" if where else str(key))
    elif isinstance(found, list | tuple):
        for place, value in enumerate(found):
            yield from _infinite(value, f"{where}[{place}]")
    elif isinstance(found, float) and (found != found or abs(found) == float("inf")):
        yield where, found
