"""Results as strict JSON: NaN and infinity are refused, because other programs refuse files that contain them."""

from __future__ import annotations

import json
from typing import Any

from pliant.errors import WeightError


def to_json(data: Any) -> str:
    """Plain data as indented JSON.

    Raises:
        WeightError: a number is not finite; the message gives its path.
    """
    try:
        return json.dumps(data, indent=1, allow_nan=False)
    except ValueError:
        path, value = next(_infinite(data, ""), ("it", "none"))
        raise WeightError(f"{path} is {value}, which is not finite; check the model's weights and the text") from None


def _infinite(data: Any, path: str) -> Any:
    """The path and value of every number that is not finite."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _infinite(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _infinite(value, f"{path}[{index}]")
    elif isinstance(data, float) and (data != data or abs(data) == float("inf")):
        yield path, data
