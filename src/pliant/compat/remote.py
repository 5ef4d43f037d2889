"""A model whose code lies in its own folder is rebuilt from its per-layer shapes like one of transformers.

transformers executes such code itself, past the import system, so that it is seen to when a class of it is looked up.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from pliant.compat.layers import wrap_models

MODULE = "transformers.dynamic_module_utils"


def wrap_remote_models(module: Any) -> None:
    """Have the constructors wrapped in every modeling file that transformers executes from a folder or a hub."""
    look_up = module.get_class_in_module

    @functools.wraps(look_up)
    def look_up_and_wrap(*args: Any, **kwargs: Any) -> type:
        found = look_up(*args, **kwargs)
        wrap_models(sys.modules[found.__module__])
        return found

    module.get_class_in_module = look_up_and_wrap
