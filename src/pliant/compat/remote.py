"""Rebuild a model with custom code from its per-layer shapes, like a model of transformers.

transformers executes custom code itself, outside the import system, so the classes are wrapped when it looks one of
them up.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from pliant.compat.layers import wrap_models

MODULE = "transformers.dynamic_module_utils"


def wrap_remote_models(module: Any) -> None:
    """Wrap the constructors in every modeling file that transformers executes from a folder or a hub."""
    look_up = module.get_class_in_module

    @functools.wraps(look_up)
    def look_up_and_wrap(*args: Any, **kwargs: Any) -> type:
        model_class = look_up(*args, **kwargs)
        wrap_models(sys.modules[model_class.__module__])
        return model_class

    module.get_class_in_module = look_up_and_wrap
