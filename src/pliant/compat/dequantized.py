"""Save a model that was dequantised at load in its current dtype, for example bfloat16 and not FP8.

transformers records in ``_weight_conversions`` how it converted the weights of a checkpoint, and reverts that when it
saves. Up to 5.23 it also reverts the dequantisation: codes and scales are written as weights, the config names no
quantisation, and the folder loads as noise. 5.24 deletes the conversions together with the quantization config, and so
do older versions with this patch.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

MODULE = "transformers.quantizers.base"
_CONVERSIONS = "_weight_conversions"


def forget_with_the_config(module: ModuleType) -> None:
    """Make every quantiser delete a model's weight conversions when it removes the quantization config."""
    remove = module.HfQuantizer.remove_quantization_config

    @functools.wraps(remove)
    def remove_both(self: Any, model: Any) -> None:
        remove(self, model)
        vars(model).pop(_CONVERSIONS, None)

    module.HfQuantizer.remove_quantization_config = remove_both
