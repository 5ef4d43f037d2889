"""stablelm: StableLM without parallel blocks."""

from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.plan import Unfit
from pliant.exporters.gguf.source import Source


class StableLM(Decoder):
    name = "stablelm"
    models = ("stablelm",)
    square = True
    partial = True
    biases = ("q", "k", "v")
    layer_norm = True
    own_head = True

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        for unread in ("use_parallel_residual", "qk_layernorm"):
            if getattr(source.config, unread):
                raise Unfit(f"{unread} is not carried")
