"""qwen3: Qwen3 with equal layers."""

from pliant.exporters.gguf.containers.decoder import Decoder


class Qwen3(Decoder):
    name = "qwen3"
    models = ("qwen3",)
    head_norms = True
