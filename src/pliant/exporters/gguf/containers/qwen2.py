"""qwen2: Qwen2 with equal layers."""

from pliant.exporters.gguf.containers.decoder import Decoder


class Qwen2(Decoder):
    name = "qwen2"
    models = ("qwen2",)
    square = True
    biases = ("q", "k", "v")
