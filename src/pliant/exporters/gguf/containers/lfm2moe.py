"""lfm2moe: LFM2 with experts in all layers but the first ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf import ExpertGatingFuncType

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import stacks
from pliant.exporters.gguf.containers.lfm2 import LFM2
from pliant.exporters.gguf.plan import Plan, Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Pair, Source


class LFM2MoE(LFM2):
    name = "lfm2moe"
    models = ("lfm2_moe",)

    def sizes(self, source: Source, layers: Sequence[Pair], width: int, plan: Plan) -> list[dict[str, int]]:
        """``experts`` is their number in a layer, 0 in the first ones."""
        routed = [pair.mlp is not None and _has_experts(source, pair.mlp) for pair in layers]
        first = routed.index(True) if True in routed else len(layers)
        if not first < len(layers):
            raise Unfit("no experts are left")
        groups = (layers[:first], layers[first:])
        if late := next((pair.mlp for pair in layers[first:] if pair.mlp and not _has_experts(source, pair.mlp)), None):
            raise Unfit(f"{late.name} has no experts, and a block before it has some, which {self.name} cannot say")
        counts = {source.units(pair.mlp, "router") for pair in groups[1] if pair.mlp}
        if len(counts) > 1:
            raise Unfit(f"its numbers of experts differ from layer to layer: {sorted(counts)}")
        found = []
        for group, count in zip(groups, (0, counts.pop()), strict=True):
            found += [{**own, "experts": count} for own in super().sizes(source, group, width, plan)]
        return found

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:
        """Without a dense layer, the width of one is not read."""
        dense = [own["up"] for own in sizes if not own["experts"]]
        return {
            **super().counts(sizes, width),
            ".feed_forward_length": dense[0] if dense else sizes[-1]["up"],
            ".expert_feed_forward_length": sizes[-1]["up"],
            ".expert_count": sizes[-1]["experts"],
            ".leading_dense_block_count": len(dense),
        }

    def more(self, source: Source) -> Mapping[str, Any]:
        config = source.config
        if not config.norm_topk_prob:
            raise Unfit(f"the weights of its experts do not add up to 1, and in {self.name} they do")
        return {
            **super().more(source),
            ".expert_used_count": config.num_experts_per_tok,
            ".expert_gating_func": int(ExpertGatingFuncType.SIGMOID),
        }

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        if not (count := own["experts"]):
            return super().rest(source, block, own, factors)
        hidden = source.config.hidden_size
        factors = {**factors, "down": factors["down"] * source.config.routed_scaling_factor}
        biased = block is not None and "expert_bias" in block.spec.weights and source.module(block).use_expert_bias
        bias = (Rows(source.path(block, "expert_bias")),) if block and biased else ()
        return [
            Tensor("ffn_norm.weight", (hidden,), () if block is None else (source.norm(block),), plain=True),
            stacks.router(source, block, count),
            Tensor("exp_probs_b.bias", (count,), bias, plain=True),
            *stacks.tensors_of(source, block, stacks.EXPERTS, own["up"], factors, (count,)),
        ]


def _has_experts(source: Source, block: Block) -> bool:
    return source.named(block, "router") is not None
