"""qwen35: Qwen 3.5."""

from collections.abc import Mapping
from typing import Any

import torch

from pliant.anatomy import Block
from pliant.exporters.gguf.containers.delta import Delta, spread
from pliant.exporters.gguf.plan import Rows, Tensor
from pliant.exporters.gguf.source import Source


class Qwen35(Delta):
    name = "qwen35"
    models = ("qwen3_5_text",)

    def more(self, source: Source) -> Mapping[str, Any]:
        """Its positions have three coordinates, which are equal in a text; each pair of dimensions has one of them."""
        found = super().more(source)
        turned = found[".rope.dimension_count"] // 2
        given = list(source.config.rope_parameters.get("mrope_section") or ())
        sections = given if sum(given) == turned else [(turned + 2 - number) // 3 for number in range(3)]
        return {**found, ".rope.dimension_sections": [*sections, 0]}

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:  # noqa: ARG002
        """In the model, the value heads of a key head are together; in the file, the first of each key head."""
        rule, hidden = source.module(block), source.config.hidden_size
        heads = torch.arange(rule.num_v_heads).view(rule.num_k_heads, -1).t().reshape(-1)
        values = spread(heads, rule.head_v_dim)
        mixed = torch.cat((torch.arange(2 * rule.key_dim), 2 * rule.key_dim + values))
        rows = {
            "attn_qkv": ("in_proj_qkv", mixed),
            "attn_gate": ("in_proj_z", values),
            "ssm_beta": ("in_proj_b", heads),
            "ssm_alpha": ("in_proj_a", heads),
        }
        return [
            *(
                Tensor(f"{name}.weight", (len(order), hidden), (Rows(source.path(block, of), order),))
                for name, (of, order) in rows.items()
            ),
            *self._rule(source, block, heads),
        ]
