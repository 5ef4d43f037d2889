"""openelm: Qwen3 with tied embeddings whose layers differ; the graph of OpenELM computes the same operations."""

from pliant.exporters.gguf.containers.decoder import QKV, Decoder


class OpenELM(Decoder):
    name = "openelm"
    models = ("qwen3",)
    uneven = True
    head_norms = True
    tied = True
    joined = QKV
