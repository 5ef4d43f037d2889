"""starcoder2: StarCoder 2, whose MLPs have no gate."""

from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.plan import Unfit
from pliant.exporters.gguf.source import Source


class StarCoder2(Decoder):
    name = "starcoder2"
    models = ("starcoder2",)
    square = True
    activations = ("gelu_pytorch_tanh",)
    biases = ("q", "k", "v", "o", "up", "down")
    gated = False
    layer_norm = True

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        if not source.config.use_bias:
            raise Unfit(f"{self.name} needs biases")
