"""BLAKE2b digests as hexadecimal text, by which recipes, archives and resumed runs are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(parts: Iterable[str | bytes], size: int = 16) -> str:
    """The digest of concatenated texts and bytes; it has ``size`` bytes."""
    hasher = hashlib.blake2b(digest_size=size)
    for part in parts:
        hasher.update(part.encode() if isinstance(part, str) else part)
    return hasher.hexdigest()


def json_digest(value: Any) -> str:
    """The digest of plain data, computed from its JSON."""
    return digest([json.dumps(value)])
