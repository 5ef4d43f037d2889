"""qwen2moe: Qwen2 with experts in every layer, and one that all tokens share."""

from pliant.exporters.gguf.containers.experts import Experts


class Qwen2MoE(Experts):
    name = "qwen2moe"
    models = ("qwen2_moe",)
    square = True
    own_head = True
    biases = ("q", "k", "v")
    normalised = False
    shared = True
