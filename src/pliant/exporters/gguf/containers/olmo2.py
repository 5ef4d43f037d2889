"""olmo2: OLMo 2, whose norms follow the blocks and whose q and k are normed over all heads."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pliant.exporters.gguf.containers.decoder import Decoder


class OLMo2(Decoder):
    name = "olmo2"
    models = ("olmo2",)
    square = True
    head_norms = True
    own_head = True
    norms: ClassVar[Mapping[str, Sequence[str]]] = {"attention": ("post_attention_norm",), "mlp": ("post_ffw_norm",)}
