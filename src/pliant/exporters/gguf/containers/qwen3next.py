"""qwen3next: Qwen3-Next with experts in every layer."""

from collections.abc import Mapping

import torch

from pliant.anatomy import Block
from pliant.exporters.gguf.containers.delta import Delta
from pliant.exporters.gguf.plan import Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Source


class Qwen3Next(Delta):
    name = "qwen3next"
    models = ("qwen3_next",)
    experts = True

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        for block in source.of_role("mlp"):
            if source.named(block, "router") is None:
                raise Unfit(f"{block.name} has no experts, as every layer of {self.name} has")

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:  # noqa: ARG002
        """In the model, the rows of a key head and its value heads are together; in the file, those of a kind."""
        rule = source.module(block)
        keys, each, values = rule.num_k_heads, rule.head_k_dim, rule.value_dim // rule.num_k_heads
        rows = torch.arange(2 * (rule.key_dim + rule.value_dim)).view(keys, -1)
        q, k, v, z = (part.reshape(-1) for part in rows.split((each, each, values, values), 1))
        name, hidden = source.path(block, "in_proj_qkvz"), source.config.hidden_size
        mixed, gate = Rows(name, torch.cat((q, k, v))), Rows(name, z)
        shares = Rows(source.path(block, "in_proj_ba"))
        return [
            Tensor("attn_qkv.weight", (2 * rule.key_dim + rule.value_dim, hidden), (mixed,)),
            Tensor("attn_gate.weight", (rule.value_dim, hidden), (gate,)),
            Tensor("ssm_ba.weight", source.shape(shares), (shares,)),
            *self._rule(source, block, torch.arange(rule.num_v_heads)),
        ]
