"""qwen35moe: Qwen 3.5 with experts."""

from pliant.exporters.gguf.containers.qwen35 import Qwen35


class Qwen35MoE(Qwen35):
    name = "qwen35moe"
    models = ("qwen3_5_moe_text",)
    experts = True
