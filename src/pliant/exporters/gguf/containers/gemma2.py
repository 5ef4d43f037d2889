"""gemma2: Gemma 2; every second layer reads all tokens, the others those in a window."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pliant.exporters.gguf.containers.gemma import Gemma
from pliant.exporters.gguf.plan import Plan, Unfit
from pliant.exporters.gguf.source import Source


class Gemma2(Gemma):
    name = "gemma2"
    models = ("gemma2",)
    norms: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": ("attn_norm", "post_attention_norm"),
        "mlp": ("ffn_norm", "post_ffw_norm"),
    }
    period = (2, "sliding_window")
    largest = 46
    """Layers of the model whose attention readers scale by hidden size and heads in place of the width of a head."""

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not getattr(source.config, cap):
                raise Unfit(f"{self.name} needs {cap}")

    def scale(self, source: Source, width: int, heads: int, depth: int) -> float:
        hidden = source.config.hidden_size
        return (hidden // heads) ** -0.5 if depth == self.largest else super().scale(source, width, heads, depth)

    def more(self, source: Source) -> Mapping[str, Any]:
        return {
            ".attention.sliding_window": source.config.sliding_window,
            ".attn_logit_softcapping": float(source.config.attn_logit_softcapping),
            ".final_logit_softcapping": float(source.config.final_logit_softcapping),
        }

    def context(self, source: Source, plan: Plan) -> int:  # noqa: ARG002
        """Readers know the windows."""
        return source.config.max_position_embeddings
