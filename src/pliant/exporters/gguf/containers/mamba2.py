"""mamba2: models of Mamba-2 scans alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Tensor
from pliant.exporters.gguf.source import Source


class Mamba2(Hybrid):
    name = "mamba2"
    models = ("mamba2",)
    activations = ()

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:  # noqa: ARG002
        """Readers ask for these keys."""
        return {".feed_forward_length": 0, ".attention.head_count": 0}

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:
        return scan.keys_of(source, plan)

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        return scan.tensors_of(source, block, factors["mixer"])
