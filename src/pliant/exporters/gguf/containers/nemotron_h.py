"""nemotron_h: a layer of the file is one block, a scan, an attention or an MLP."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Tensor
from pliant.exporters.gguf.source import MIXERS, Pair, Source


class NemotronH(Hybrid):
    name = "nemotron_h"
    models = ("nemotron_h",)
    biases = ("q", "k", "v", "o", "up", "down")
    activations = ("relu2",)
    gated = False
    norms: ClassVar[Mapping[str, Sequence[str]]] = {"attention": ("attn_norm",), "mlp": ("attn_norm",)}

    def layers(self, source: Source) -> list[Pair]:
        """One block each, so that a removed block leaves nothing."""
        blocks = source.anatomy.blocks.values()
        return [Pair(block, None) if block.role in MIXERS else Pair(None, block) for block in blocks]

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:
        return scan.keys_of(source, plan)

    def more(self, source: Source) -> Mapping[str, Any]:
        """The epsilon again, under the key that newer readers ask for."""
        return {".attention.layer_norm_epsilon": scan.epsilon_of(source) or self.epsilon(source)}

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        return scan.tensors_of(source, block, factors["mixer"])
