"""The multipliers of falcon_h1's Mamba mixers after some of these were cut or removed.

transformers computes one vector from the config and copies it into every mixer when it loads weights. A cut model has
mixers of different sizes, and layers without one. So each mixer gets a vector of its own size, by the same function.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

_MARK = "_pliant_multipliers"


def wrap_multipliers(modeling: ModuleType) -> None:
    """Replace the initialisation of the vectors in the modeling file of falcon_h1."""
    if not hasattr(modeling, "compute_mup_vector"):
        return
    base: Any = modeling.FalconH1PreTrainedModel
    original = base._init_weights
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize(self: Any, module: Any) -> None:
        if not isinstance(module, modeling.FalconH1Model):
            return original(self, module)
        from transformers import initialization

        super(base, self)._init_weights(module)
        for layer in module.layers:
            if not isinstance(layer.mamba, modeling.FalconH1Mixer):
                continue
            own_sizes = SimpleNamespace(
                mamba_d_ssm=layer.mamba.intermediate_size,
                mamba_n_groups=layer.mamba.n_groups,
                mamba_d_state=layer.mamba.ssm_state_size,
                mamba_n_heads=layer.mamba.num_heads,
                ssm_multipliers=module.config.ssm_multipliers,
            )
            initialization.copy_(layer.mamba.mup_vector, modeling.compute_mup_vector(own_sizes))
        return None

    setattr(initialize, _MARK, True)
    base._init_weights = initialize
