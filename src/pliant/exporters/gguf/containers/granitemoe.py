"""granitemoe: Granite with experts in every layer; its constants have keys."""

from pliant.exporters.gguf.containers.experts import Experts
from pliant.exporters.gguf.containers.granite import Granite


class GraniteMoE(Experts):
    name = "granitemoe"
    models = ("granitemoe",)
    pairs = True
    rope_tensors = Granite.rope_tensors
    biases = ("q", "k", "v", "o")
    constants = Granite.constants
