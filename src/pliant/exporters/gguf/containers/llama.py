"""llama: Llama, Mistral and models like them, with equal layers."""

from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.rope import FREQUENCIES, LONG, SHORT


class Llama(Decoder):
    name = "llama"
    models = ("llama", "mistral")
    pairs = True
    rope_tensors = (FREQUENCIES, LONG, SHORT)
    biases = ("q", "k", "v", "o")
