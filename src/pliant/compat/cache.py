"""The word for a key-value cache: ``cache`` since transformers 5.24, ``past_key_values`` before.

Each version warns of, or does not know, the other's. Models from elsewhere keep to the word they were written with, so it is
asked of the model and not of the version.
"""

from __future__ import annotations

import inspect
from typing import Any

WORDS = ("cache", "past_key_values", "cache_params")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A key-value cache as the keyword argument that ``model.forward`` takes it in.

    Raises:
        TypeError: the model takes no cache.
    """
    known = inspect.signature(model.forward).parameters
    for word in WORDS:
        if word in known:
            return {word: cache}
    raise TypeError(f"{type(model).__name__}.forward takes no key-value cache: it has none of {', '.join(WORDS)}")
