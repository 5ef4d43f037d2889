"""phi3: Phi 3 with equal layers; q, k and v are one matrix, as are gate and up."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pliant.exporters.gguf.containers.decoder import QKV, Decoder
from pliant.exporters.gguf.rope import LONG, SHORT


class Phi3(Decoder):
    name = "phi3"
    models = ("phi3",)
    square = True
    partial = True
    rope_tensors = (LONG, SHORT)
    joined: ClassVar[Mapping[str, Sequence[str]]] = {**QKV, "ffn_up": ("ffn_gate", "ffn_up")}
