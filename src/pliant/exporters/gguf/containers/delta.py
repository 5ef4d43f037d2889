"""Base of the containers of the Qwen family with gated delta rules in most layers and attention in the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import stacks
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Pair, Source

UNIT = 1e-6  # what transformers adds to the squared length of a query or key; readers add the epsilon of norms


class Delta(Hybrid):
    """One architecture of llama.cpp with delta rules; the file lists their layers.

    Attributes:
        experts: every layer has experts, and one that all tokens share.
    """

    head_norms = True
    gated_heads = True
    norm_shift = 1.0
    partial = True
    padded = True
    norms: ClassVar[Mapping[str, Sequence[str]]] = {"attention": ("attn_norm",), "mlp": ("post_attention_norm",)}
    experts: ClassVar[bool] = False

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        if not width:
            raise Unfit("no attention is left")
        if not math.isclose(epsilon := self.epsilon(source), UNIT, rel_tol=1e-6):
            raise Unfit(f"its norms have the epsilon {epsilon:g}, and those of keys and queries have {UNIT:g}")
        if self.experts and not getattr(source.config, "norm_topk_prob", True):
            raise Unfit(f"{self.name} divides the shares of the chosen experts by their sum, unlike this model")

    def sizes(self, source: Source, layers: Sequence[Pair], width: int, plan: Plan) -> list[dict[str, int]]:
        """Heads and widths are the same in all layers; ``mixes`` marks those without an attention."""
        found = super().sizes(source, layers, width, plan)
        attentions = [own for own, pair in zip(found, layers, strict=True) if pair.mixer and own["q"]]
        self._uniform(attentions, ["q", "k"])
        self._uniform(found, ["up"])
        for own, pair in zip(found, layers, strict=True):
            own["mixes"] = int(pair.mixer is not None and pair.mixer.role == "scan")
            if not own["mixes"]:
                own |= {role: attentions[0][role] for role in ("q", "k")}
        return found

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:
        attention = next(own for own in sizes if own["q"])
        return {
            ".feed_forward_length": sizes[0]["up"],
            ".attention.head_count": attention["q"] // width,
            ".attention.head_count_kv": attention["k"] // width,
            ".attention.recurrent_layers": [bool(own["mixes"]) for own in sizes],
        }

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:  # noqa: ARG002
        """The sizes of its delta rules."""
        found = set()
        for block in source.of_role("scan"):
            rule = source.module(block)
            if rule.head_k_dim != rule.head_v_dim:
                raise Unfit(
                    f"{block.name} has keys of {rule.head_k_dim} and values of {rule.head_v_dim} dimensions, "
                    f"and {self.name} has as many of each"
                )
            found.add((rule.conv_kernel_size, rule.value_dim, rule.head_k_dim, rule.num_v_heads, rule.num_k_heads))
        if not found:
            raise Unfit("no delta rule is left")
        if len(found) > 1:
            raise Unfit(f"the heads of its delta rules differ from layer to layer, and {self.name} has one for all")
        names = ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")
        return {f".ssm.{name}": int(size) for name, size in zip(names, found.pop(), strict=True)}

    def more(self, source: Source) -> Mapping[str, Any]:
        keys = self.rope(source, source.head_width())[0]
        if not self.experts:
            return keys
        for role in ("router", "up", "shared_up"):
            counts = {source.units(block, role) for block in source.of_role("mlp")}
            if len(counts) > 1:
                raise Unfit(f"the numbers or widths of its experts differ from layer to layer: {sorted(counts)}")
        first = source.of_role("mlp")[0]
        return {
            **keys,
            ".expert_count": source.units(first, "router"),
            ".expert_used_count": source.config.num_experts_per_tok,
            ".expert_feed_forward_length": source.units(first, "up"),
            ".expert_shared_feed_forward_length": source.units(first, "shared_up"),
        }

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        if not self.experts:
            return super().rest(source, block, own, factors)
        some, hidden = source.of_role("mlp")[0], source.config.hidden_size
        count, width = source.units(some, "router"), source.units(some, "shared_up")
        share = () if block is None else (source.rows(block, "shared_router"),)
        name = f"{self.norms['mlp'][0]}.weight"
        norm = Tensor(name, (hidden,)) if block is None else self._norms(source, block)[0]
        return [
            norm,
            stacks.router(source, block, count),
            *stacks.tensors_of(source, block, stacks.EXPERTS, own["up"], factors, (count,)),
            Tensor("ffn_gate_inp_shexp.weight", (hidden,), share, lambda values: values.view(-1), plain=True),
            *stacks.tensors_of(source, block, stacks.SHARED, width, factors, prefix="shared_"),
        ]

    def _rule(self, source: Source, block: Block, heads: torch.Tensor) -> list[Tensor]:
        """The tensors of a delta rule that all these containers have.

        Arguments:
            heads: the order of its value heads in the file.
        """
        rule = source.module(block)
        values = spread(heads, rule.head_v_dim)
        channels = torch.cat((torch.arange(2 * rule.key_dim), 2 * rule.key_dim + values))
        conv, norm = Rows(source.path(block, "conv1d"), channels), Rows(source.path(block, "norm"))
        logs, steps = (Rows(source.path(block, name), heads) for name in ("A_log", "dt_bias"))
        out = Rows(source.path(block, "out_proj"), values, dim=1)
        kernel = (len(channels), rule.conv_kernel_size)
        if rule.conv1d.bias is not None:
            raise Unfit(f"the convolution of {block.name} has a bias, and {self.name} has none there")
        return [
            Tensor("ssm_conv1d.weight", kernel, (conv,), lambda weights: weights.squeeze(1), plain=True),
            Tensor("ssm_dt.bias", (len(heads),), (steps,), plain=True),
            Tensor("ssm_a", (len(heads),), (logs,), lambda values: -values.exp(), plain=True),
            Tensor("ssm_norm.weight", (rule.head_v_dim,), (norm,), plain=True),
            Tensor("ssm_out.weight", (source.config.hidden_size, len(values)), (out,)),
        ]


def spread(units: torch.Tensor, width: int) -> torch.Tensor:
    """The elements of units, each ``width`` wide."""
    return (units.unsqueeze(1) * width + torch.arange(width)).view(-1)
