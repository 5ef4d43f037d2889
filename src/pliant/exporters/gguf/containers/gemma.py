"""gemma: Gemma, whose norms add 1 to their weights and whose embedding is scaled by its readers."""

from pliant.exporters.gguf.containers.decoder import Decoder


class Gemma(Decoder):
    name = "gemma"
    models = ("gemma",)
    activations = ("gelu_pytorch_tanh",)
    norm_shift = 1.0
    tied = True
