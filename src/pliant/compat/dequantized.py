"""A model that was dequantised while it was loaded is saved as what it is by then: in bfloat16, say, and not in FP8.

transformers remembers in ``_weight_conversions`` what it did to the weights of a checkpoint and undoes it when it saves. Up to
5.23 that goes for the dequantisation, too: codes and scales are written as weights, with a config that names no quantisation,
and the folder loads as noise. 5.24 forgets the conversions together with the quantization config. So does every version then.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

MODULE = "transformers.quantizers.base"
_CONVERSIONS = "_weight_conversions"


def forget_with_the_config(module: ModuleType) -> None:
    """Have every quantiser forget the conversions of a model's weights when it removes the quantization config."""
    remove = module.HfQuantizer.remove_quantization_config

    @functools.wraps(remove)
    def remove_both(self: Any, model: Any) -> None:
        remove(self, model)
        vars(model).pop(_CONVERSIONS, None)

    module.HfQuantizer.remove_quantization_config = remove_both
