"""Format bytes, seconds and differences as text, and parse bytes from text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pliant.errors import MemoryLimitError


def duration(seconds: float) -> str:
    """``95.2`` -> ``1m35s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def human_bytes(count: float) -> str:
    """``538060032`` bytes -> ``513 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if round(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys whose values differ, with both values, at most four of them; an empty text if there are none."""
    keys = sorted(key for key in {*stored, *now} if stored.get(key) != now.get(key))
    return "; ".join(f"{key}: {stored.get(key)!r} in the file, {now.get(key)!r} now" for key in keys[:4])


def parse_bytes(text: str) -> int:
    """``2GB`` -> ``2000000000``, ``2GiB`` -> ``2147483648``.

    Raises:
        MemoryLimitError: the text is not an amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    count = 0
    if match is not None:
        number, unit, binary = match.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))
    if count <= 0:
        raise MemoryLimitError(f"memory must be a number with a unit, such as 500MB or 2GB; not {text!r}")
    return count
