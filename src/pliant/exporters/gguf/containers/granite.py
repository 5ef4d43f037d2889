"""granite: Granite with equal layers; its constants have keys."""

from collections.abc import Mapping
from typing import ClassVar

from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.rope import FREQUENCIES, LONG, SHORT


class Granite(Decoder):
    name = "granite"
    models = ("granite",)
    pairs = True
    rope_tensors = (FREQUENCIES, LONG, SHORT)
    biases = ("q", "k", "v", "o", "gate", "up", "down")
    constants: ClassVar[Mapping[str, str]] = {
        "attention_multiplier": ".attention.scale",
        "embedding_multiplier": ".embedding_scale",
        "residual_multiplier": ".residual_scale",
        "logits_scaling": ".logit_scale",
    }
