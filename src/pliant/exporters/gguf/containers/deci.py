"""deci: models like Llama whose layers differ in heads, key-value heads and MLP width, or have no attention."""

from pliant.exporters.gguf.containers.decoder import Decoder


class Deci(Decoder):
    name = "deci"
    models = ("llama", "mistral", "qwen2")
    uneven = True
    headless = True
    pairs = True
    biases = ("q", "k", "v", "o", "gate", "up", "down")
