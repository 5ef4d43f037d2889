"""qwen3moe: Qwen3 with experts in every layer."""

from pliant.exporters.gguf.containers.experts import Experts


class Qwen3MoE(Experts):
    name = "qwen3moe"
    models = ("qwen3_moe",)
    head_norms = True
