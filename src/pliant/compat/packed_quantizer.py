"""Register packed layers as a quantisation method of transformers: their config, and the quantiser that loads them.

``import pliant`` is enough for transformers to know ``"quant_method": "pliant"``. This module is imported right after
that registry, when the rest of transformers may not be imported yet.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pliant.runtime.packed_matrix import METHOD

VERSION = 1


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Which layers are packed, and how.

    Attributes:
        modules: name of a layer -> ``format``, ``sparse``, ``bytes``.
        cache: settings of :class:`pliant.runtime.kv_blocks.Keeping` for the caches that the model makes itself.
    """

    def __init__(
        self,
        version: int = VERSION,
        modules: dict[str, Any] | None = None,
        cache: dict[str, Any] | None = None,
        **_: Any,
    ):
        self.quant_method: Any = METHOD
        self.version = version
        self.modules = modules or {}
        self.cache = cache or {}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Builds packed layers before weights are loaded, and checks them afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        from pliant.compat.packed_layers import make_room

        make_room(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from transformers import PreTrainedModel

        from pliant.compat.native_check import run_natively
        from pliant.compat.packed_layers import settle

        settle(model)
        run_natively(model)
        for part in model.modules():
            # falcon_mamba and jamba would call dt_proj, which is not packed, and subtract its bias from the result
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> Any:
        return False
