"""deci: models like Llama whose layers differ in heads, key-value heads and MLP width, or have no attention."""

from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.rope import FREQUENCIES, LONG, SHORT


class Deci(Decoder):
    name = "deci"
    models = ("llama", "mistral", "qwen2", "granite", "phi3")
    uneven = True
    headless = True
    pairs = True
    rope_tensors = (FREQUENCIES, LONG, SHORT)
    biases = ("q", "k", "v", "o", "gate", "up", "down")
