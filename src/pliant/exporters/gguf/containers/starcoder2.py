"""starcoder2: StarCoder 2, whose MLPs have no gate."""

from pliant.exporters.gguf.containers.decoder import Decoder


class StarCoder2(Decoder):
    name = "starcoder2"
    models = ("starcoder2",)
    square = True
    activations = ("gelu_pytorch_tanh",)
    biases = ("q", "k", "v", "o", "up", "down")
    gated = False
    layer_norm = True
