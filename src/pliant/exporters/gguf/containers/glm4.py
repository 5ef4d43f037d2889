"""glm4: GLM 4, which rotates neighbouring dimensions as its readers do, and has norms after blocks, too."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.containers.gemma2 import Gemma2


class GLM4(Decoder):
    name = "glm4"
    models = ("glm4",)
    partial = True
    biases = ("q", "k", "v")
    norms = Gemma2.norms
    joined: ClassVar[Mapping[str, Sequence[str]]] = {"ffn_up": ("ffn_gate", "ffn_up")}
