"""jamba: Jamba, whose layers are a scan or an attention, and an MLP or experts."""

from collections.abc import Mapping
from typing import Any

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import selective, stacks
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Tensor, Unfit
from pliant.exporters.gguf.source import Source


class Jamba(Hybrid):
    name = "jamba"
    models = ("jamba",)
    padded = True
    alike = True
    square = True

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:  # noqa: ARG002
        return selective.keys_of(source)

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        return selective.tensors_of(source, block, self.epsilon(source), factors["mixer"])

    def more(self, source: Source) -> Mapping[str, Any]:
        """The number of experts, if a layer has some."""
        blocks = source.of_role("mlp")
        counts = {source.units(block, "router") for block in blocks if source.named(block, "router") is not None}
        if len(counts) > 1:
            raise Unfit(f"its numbers of experts differ from layer to layer: {sorted(counts)}")
        used = source.config.num_experts_per_tok
        return {".expert_count": counts.pop(), ".expert_used_count": used} if counts else {}

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        if block is None or source.named(block, "router") is None:
            return super().rest(source, block, own, factors)
        count = source.units(block, "router")
        return [
            self._norm(source, "ffn_norm", source.norm(block)),
            stacks.router(source, block, count),
            *stacks.tensors_of(source, block, stacks.EXPERTS, own["up"], factors, (count,)),
        ]
