"""lfm2: LFM2, whose layers are a short convolution or an attention, and an MLP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan
from pliant.exporters.gguf.containers.hybrid import Hybrid
from pliant.exporters.gguf.plan import Plan, Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Source


class LFM2(Hybrid):
    name = "lfm2"
    models = ("lfm2",)
    head_norms = True
    padded = True
    alike = True
    square = True

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:  # noqa: ARG002
        """The width of the convolutions, whose channels are those of the residual stream."""
        blocks = source.of_role("conv")
        if not blocks:
            raise Unfit("no convolution is left")
        for block in blocks:
            conv = source.module(block).conv
            if (channels := conv.weight.shape[0]) != source.config.hidden_size:
                raise Unfit(f"{block.name} has {channels} channels, and {self.name} has {source.config.hidden_size}")
            if conv.bias is not None or source.module(block).in_proj.bias is not None:
                raise Unfit(f"{block.name} has biases, and {self.name} has none there")
        return {".shortconv.l_cache": int(source.module(blocks[0]).conv.weight.shape[-1])}

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        into, out = Rows(source.path(block, "in_proj")), Rows(source.path(block, "out_proj"), factor=factors["mixer"])
        weight, _ = scan.convolution(source, block, "conv", "shortconv.conv")
        return [
            weight,
            Tensor("shortconv.in_proj.weight", source.shape(into), (into,)),
            Tensor("shortconv.out_proj.weight", source.shape(out), (out,)),
        ]

    def more(self, source: Source) -> Mapping[str, Any]:
        return self.rope(source, source.head_width())[0]

    def _ends(self, source: Source, factors: Mapping[str, float]) -> list[Tensor]:
        """Its last norm has a name of its own."""
        names = {"output_norm.weight": "token_embd_norm.weight"}
        return [replace(tensor, name=names.get(tensor.name, tensor.name)) for tensor in super()._ends(source, factors)]
