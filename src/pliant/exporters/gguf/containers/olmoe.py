"""olmoe: OLMoE, whose q and k are normed over all heads."""

from pliant.exporters.gguf.containers.experts import Experts
from pliant.exporters.gguf.plan import Unfit
from pliant.exporters.gguf.source import Source


class OLMoE(Experts):
    name = "olmoe"
    models = ("olmoe",)
    square = True
    head_norms = True
    own_head = True
    normalised = False

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        if source.config.clip_qkv is not None:
            raise Unfit(f"{self.name} has no clip_qkv")
        if source.config.num_key_value_heads != source.config.num_attention_heads:
            raise Unfit(f"{self.name} has a key-value head for every head")
