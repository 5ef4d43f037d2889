"""The quantiser by which transformers loads a model with packed layers, in its registry of quantisation methods.

Imported right after that registry, while the rest of transformers may not be there yet.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from pliant.runtime.packed_matrix import METHOD


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Builds packed layers before weights are loaded, and checks them afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        from pliant.checkpoint.packed_config import make_room

        make_room(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from pliant.checkpoint.packed_config import settle
        from pliant.compat.native import run_natively

        settle(model)
        run_natively(model)
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> Any:
        return False
