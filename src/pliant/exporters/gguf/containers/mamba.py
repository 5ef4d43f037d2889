"""mamba: Mamba and Falcon Mamba."""

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import selective
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Tensor
from pliant.exporters.gguf.source import Source


class Mamba(Hybrid):
    name = "mamba"
    models = ("mamba", "falcon_mamba")
    activations = ()

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:  # noqa: ARG002
        """Readers ask for these keys."""
        return {".feed_forward_length": 0, ".attention.head_count": 0}

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:  # noqa: ARG002
        """Sizes, and whether time steps, B and C are normed, which those of Falcon Mamba are."""
        return {**selective.keys_of(source), ".ssm.dt_b_c_rms": source.kind == "falcon_mamba"}

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        return selective.tensors_of(source, block, self.epsilon(source), factors["mixer"])
