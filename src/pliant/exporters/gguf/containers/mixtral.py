"""llama with experts: Mixtral."""

from pliant.exporters.gguf.containers.experts import Experts
from pliant.exporters.gguf.rope import FREQUENCIES, LONG, SHORT


class Mixtral(Experts):
    name = "llama"
    models = ("mixtral",)
    pairs = True
    rope_tensors = (FREQUENCIES, LONG, SHORT)
