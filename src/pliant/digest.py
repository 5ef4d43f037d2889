"""Digests (BLAKE2b, as hexadecimal text) that recipes, archives and resumed runs are compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(parts: Iterable[str | bytes], size: int = 16) -> str:
    """The digest of texts and bytes, one after the other, of ``size`` bytes."""
    found = hashlib.blake2b(digest_size=size)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def json_digest(value: Any) -> str:
    """The digest of plain data, by its JSON."""
    return digest([json.dumps(value)])
