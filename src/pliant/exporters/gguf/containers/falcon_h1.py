"""falcon-h1: Falcon H1, whose layers are an attention beside a scan, and an MLP."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Tensor, Unfit
from pliant.exporters.gguf.source import Pair, Source


class FalconH1(Hybrid):
    name = "falcon-h1"
    models = ("falcon_h1",)

    def layers(self, source: Source) -> list[Pair]:
        """Blocks stay in their layer, because two of them read the same input."""
        return source.layers()

    def sizes(self, source: Source, layers: Sequence[Pair], width: int, plan: Plan) -> list[dict[str, int]]:
        """The same for all layers; a block that was removed is zeros."""
        found = {}
        for role, kind, unit in (("q", "attention", width), ("k", "attention", width), ("up", "mlp", 1)):
            counts = {source.units(block, role) for block in source.of_role(kind)}
            if len(counts) != 1:
                problem = f"{sorted(counts)} differ from layer to layer" if counts else "none is left"
                raise Unfit(f"its {kind} sizes ({role}): {problem}, and {self.name} has one for all layers")
            found[role] = counts.pop() * unit
        for number, pair in enumerate(layers):
            present = source.beside(pair.mixer or pair.mlp)
            plan.notes += [
                f"layer {number} of the file has a block ({kind}) of full size that adds nothing"
                for kind in ("attention", "scan", "mlp")
                if kind not in present
            ]
        return [{**found, "gate": found["up"]} for _ in layers]

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:
        return {
            ".feed_forward_length": sizes[0]["up"],
            ".attention.head_count": sizes[0]["q"] // width,
            ".attention.head_count_kv": sizes[0]["k"] // width,
        }

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:
        return scan.keys_of(source, plan)

    def more(self, source: Source) -> Mapping[str, Any]:
        return self.rope(source, source.head_width())[0]

    def enlarged(self, source: Source) -> Mapping[str, float]:
        """With the multipliers of the model, which readers do not know."""
        config, found = source.config, dict(super().enlarged(source))
        inward, (gate, down) = float(config.attention_in_multiplier), config.mlp_multipliers
        logits = float(config.lm_head_multiplier)
        own = {
            "q": inward,
            "k": inward * config.key_multiplier,
            "v": inward,
            "o": config.attention_out_multiplier,
            "gate": gate,
            "down": down,
            "mixer": config.ssm_out_multiplier,
            "embedding": config.embedding_multiplier,
            "output": logits,
            "norm": 1.0 if source.output() else logits / config.embedding_multiplier,
        }
        return found | {role: found.get(role, 1.0) * float(factor) for role, factor in own.items()}

    def mixer(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The attention, the scan, and the norm that they share."""
        beside = source.beside(block)
        some = source.of_role("scan")[0]
        found = self.attention(source, beside.get("attention"), own, factors)
        if (mixer := beside.get("scan")) is None:
            normed = scan.norm_of(source.module(some)) is not None
            return found + scan.empty(scan.keys_of(source, Plan(self.name)), source.config.hidden_size, normed)
        norm = self._norm(source, "attn_norm", source.norm(mixer))
        found = [norm if tensor.name == norm.name else tensor for tensor in found]
        inward = [float(source.config.ssm_in_multiplier * factor) for factor in source.config.ssm_multipliers]
        return found + scan.tensors_of(source, mixer, factors["mixer"], inward)

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """Its norm has a name of its own."""
        found = super().rest(source, block, own, factors)
        return [replace(tensor, name="ffn_norm") if tensor.name == "ffn_norm.weight" else tensor for tensor in found]
