"""nemotron_h_moe: Nemotron-H with layers of experts in place of MLPs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import stacks
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.containers.nemotron_h import NemotronH
from pliant.exporters.gguf.plan import Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Source

LATENT = {"ffn_latent_down": "fc1_latent_proj", "ffn_latent_up": "fc2_latent_proj"}


class NemotronHMoE(NemotronH):
    name = "nemotron_h_moe"
    norms: ClassVar[Mapping[str, Sequence[str]]] = {**NemotronH.norms, "experts": ("attn_norm",)}

    def check(self, source: Source, width: int) -> None:
        Hybrid.check(self, source, width)
        if not source.of_role("experts"):
            raise Unfit("it has no experts")
        if mlps := source.of_role("mlp"):
            raise Unfit(f"{mlps[0].name} has no experts, as every MLP of {self.name} has")
        if source.config.n_group != 1:
            raise Unfit(f"its experts are chosen in {source.config.n_group} groups, which is not written")
        for role in ("router", "shared_up"):
            counts = {source.units(block, role) for block in source.of_role("experts")}
            if len(counts) > 1:
                raise Unfit(f"its experts, or shared ones, differ from layer to layer ({role}: {sorted(counts)})")

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:
        """Newer readers take a width for each layer; a file of equal ones is for older readers, too."""
        widths = [own["up"] for own in sizes]
        same = len(set(widths) - {0}) == 1
        return {**super().counts(sizes, width), ".expert_feed_forward_length": max(widths) if same else widths}

    def more(self, source: Source) -> Mapping[str, Any]:
        config, first = source.config, source.of_role("experts")[0]
        latent = getattr(config, "moe_latent_size", None)
        return {
            **super().more(source),
            ".expert_count": source.units(first, "router"),
            ".expert_used_count": config.num_experts_per_tok,
            ".expert_shared_count": config.n_shared_experts,
            ".expert_shared_feed_forward_length": source.units(first, "shared_up"),
            ".expert_weights_norm": bool(config.norm_topk_prob),
            ".expert_weights_scale": float(config.routed_scaling_factor),
            **({".moe_latent_size": latent} if latent else {}),
        }

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """Experts without a gate, of the residual stream or of latent channels, and a shared one."""
        if block is None:
            return []
        hidden, count, shared = (
            source.config.hidden_size,
            source.units(block, "router"),
            source.units(block, "shared_up"),
        )
        bias = Rows(source.path(block, "gate.e_score_correction_bias"))
        found = [
            *self._norms(source, block),
            stacks.router(source, block, count),
            Tensor("exp_probs_b.bias", (count,), (bias,), plain=True),
        ]
        latent = getattr(source.config, "moe_latent_size", None)
        inner = latent or hidden
        for name, of in LATENT.items() if latent else ():
            rows = Rows(source.path(block, of), factor=factors["down"] if name == "ffn_latent_up" else 1.0)
            shape = (hidden, inner) if name == "ffn_latent_up" else (inner, hidden)
            found += self._linear(source, name, rows, shape, "latent")
        shapes = {
            "up": ("ffn_up_exps", (count, own["up"], inner), 1.0),
            "down": ("ffn_down_exps", (count, inner, own["up"]), 1.0 if latent else factors["down"]),
            "shared_up": ("ffn_up_shexp", (shared, hidden), 1.0),
            "shared_down": ("ffn_down_shexp", (hidden, shared), factors["down"]),
        }
        for role, (name, shape, factor) in shapes.items():
            found += self._linear(source, name, source.rows(block, role, None, factor), shape, role)
        return found
