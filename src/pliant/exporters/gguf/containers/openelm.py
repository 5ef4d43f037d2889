"""openelm: Qwen3 with tied embeddings whose layers differ; the graph of OpenELM computes the same operations."""

from collections.abc import Mapping

from pliant.anatomy import Block
from pliant.exporters.gguf.containers.decoder import Decoder
from pliant.exporters.gguf.plan import Tensor
from pliant.exporters.gguf.source import Source


class OpenELM(Decoder):
    name = "openelm"
    models = ("qwen3",)
    uneven = True
    head_norms = True
    tied = True

    def attention(
        self, source: Source, block: Block | None, sizes: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """q, k and v are one matrix."""
        found = {tensor.name: tensor for tensor in super().attention(source, block, sizes, factors)}
        parts = [found.pop(f"attn_{name}.weight") for name in "qkv"]
        rows = sum(part.shape[0] for part in parts)
        joined = tuple(piece for part in parts for piece in part.parts)
        return [*found.values(), Tensor("attn_qkv.weight", (rows, parts[0].shape[1]), joined)]
