"""BLAKE2b digests as hexadecimal text, by which recipes, archives and resumed runs are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(parts: Iterable[str | bytes], size: int = 16) -> str:
    """The digest of concatenated texts and bytes; it has ``size`` bytes."""
    hasher = hashlib.blake2b(digest_size=size)
    for part in parts:
        hasher.update(part.encode() if isinstance(part, str) else part)
    return hasher.hexdigest()


def json_digest(value: Any) -> str:
    """The digest of plain data, computed from its JSON. Other values in it count as their text."""
    return digest([json.dumps(value, default=str)])


def path_digest(path: str) -> str | None:
    """The digest of a file, or of the names, sizes and times of the files in a folder; None if the path is neither."""
    place = Path(path).expanduser()
    if place.is_file():
        with place.open("rb") as file:
            return digest(iter(lambda: file.read(1 << 20), b""))
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if file.is_file()]
        return json_digest([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return None
