"""The name of the key-value cache argument: ``cache`` since transformers 5.24, ``past_key_values`` before.

Each version warns about or rejects the other name. Custom model code keeps the name it was written with, so the name is
read from the model's signature and not from the version.
"""

from __future__ import annotations

import inspect
from typing import Any

WORDS = ("cache", "past_key_values", "cache_params")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that passes ``cache`` to ``model.forward``, as a dict.

    Raises:
        TypeError: the model accepts no cache.
    """
    known = inspect.signature(model.forward).parameters
    for word in WORDS:
        if word in known:
            return {word: cache}
    raise TypeError(f"{type(model).__name__}.forward takes no key-value cache: it has none of {', '.join(WORDS)}")
