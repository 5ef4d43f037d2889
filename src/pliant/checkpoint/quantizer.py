"""The ``quantization_config`` of a model with packed layers, in transformers' registry of these."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
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
