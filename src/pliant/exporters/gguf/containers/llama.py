"""llama: Llama, Mistral and models like them, with equal layers."""

from pliant.exporters.gguf.containers.decoder import Decoder


class Llama(Decoder):
    name = "llama"
    models = ("llama", "mistral")
    pairs = True
    biases = ("q", "k", "v", "o")
