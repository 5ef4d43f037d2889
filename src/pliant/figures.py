"""Figures as JSON, which knows no NaN and no infinity; other programs refuse a file that holds one."""

from __future__ import annotations

import json
from typing import Any

from pliant.errors import WeightError


def to_json(found: Any) -> str:
    """JSON of plain data, indented.

    Raises:
        WeightError: there is a figure that is no finite number; the message says where.
    """
    try:
        return json.dumps(found, indent=1, allow_nan=False)
    except ValueError:
        where, value = next(_infinite(found, ""), ("it", "none"))
        raise WeightError(f"{where} is {value}, no finite number; the model's weights or the text are broken") from None


def _infinite(found: Any, where: str) -> Any:
    """Where there are such figures, and what they are."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _infinite(value, f"{where}.{key}" if where else str(key))
    elif isinstance(found, list | tuple):
        for place, value in enumerate(found):
            yield from _infinite(value, f"{where}[{place}]")
    elif isinstance(found, float) and (found != found or abs(found) == float("inf")):
        yield where, found
