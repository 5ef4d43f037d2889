"""granitehybrid: Granite 4 and Bamba, whose layers are a scan or an attention, and an MLP or experts beside one."""

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan, stacks
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Tensor, Unfit
from pliant.exporters.gguf.source import Pair, Source


class GraniteHybrid(Hybrid):
    name = "granitehybrid"
    models = ("granitemoehybrid", "bamba")
    pairs = True
    partial = True
    biases = ("q", "k", "v", "o", "gate", "up", "down")
    scaled = True
    padded = True

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        if not source.of_role("scan"):
            raise Unfit("no scan is left")
        if not width:
            raise Unfit("no attention is left")

    def layers(self, source: Source) -> list[Pair]:
        """Experts stay in the layer of the MLP beside them."""
        return source.layers() if source.of_role("experts") else source.pairs()

    def sizes(self, source: Source, layers: Sequence[Pair], width: int, plan: Plan) -> list[dict[str, int]]:
        """With experts, ``up`` is their width, and ``shared`` that of the MLP."""
        routed = source.of_role("experts")
        found = super().sizes(source, layers, width, plan)
        if not routed:
            self._uniform(found, ["up"])
            return found
        of_all = {}
        for name, blocks, role in (("up", routed, "up"), ("experts", routed, "router"), ("shared", None, "up")):
            counts = {source.units(block, role) for block in blocks or source.of_role("mlp")}
            if len(counts) > 1:
                raise Unfit(f"the numbers or widths of its experts differ from layer to layer: {sorted(counts)}")
            of_all[name] = counts.pop() if counts else 0
        return [{**own, **of_all, "gate": of_all["up"]} for own in found]

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:
        return {**super().counts(sizes, width), ".feed_forward_length": sizes[0]["up"]}

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:
        keys = scan.keys_of(source, plan)
        if keys[".ssm.inner_size"] != (wide := 2 * source.config.hidden_size):
            raise Unfit(f"its scans have {keys['.ssm.inner_size']} channels, and those of {self.name} have {wide}")
        return keys

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        return scan.tensors_of(source, block, factors["mixer"])

    def more(self, source: Source) -> Mapping[str, Any]:
        """Positions, multipliers and experts."""
        config = source.config
        rotates = getattr(config, "position_embedding_type", "rope") == "rope"
        keys, _ = self.rope(source, source.head_width())
        keys[".rope.scaling.finetuned"] = rotates
        named = {"logit_scale": "logits_scaling", "residual_scale": "residual_multiplier"}
        named |= {"embedding_scale": "embedding_multiplier"}
        keys |= {f".{name}": float(getattr(config, key)) for name, key in named.items() if hasattr(config, key)}
        if routed := source.of_role("experts"):
            keys[".expert_count"] = source.units(routed[0], "router")
            keys[".expert_used_count"] = config.num_experts_per_tok
        if routed and (shared := source.of_role("mlp")):
            keys[".expert_shared_feed_forward_length"] = source.units(shared[0], "up")
        return keys

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The MLP of a layer; with experts, those and the MLP as a shared one."""
        if "experts" not in own:
            return super().rest(source, block, own, factors)
        beside, hidden, count = source.beside(block), source.config.hidden_size, own["experts"]
        routed, shared = beside.get("experts"), beside.get("mlp")
        found = [
            Tensor("ffn_norm.weight", (hidden,), () if block is None else (source.norm(block),), plain=True),
            stacks.router(source, routed, count),
            *stacks.tensors_of(source, routed, stacks.EXPERTS, own["up"], factors, (count,)),
        ]
        if own["shared"]:
            found += stacks.tensors_of(source, shared, stacks.SHARED, own["shared"], factors)
        return found
