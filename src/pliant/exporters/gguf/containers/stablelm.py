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
        if source.config.use_parallel_residual:
            raise Unfit(f"{self.name} with parallel blocks is not written")
