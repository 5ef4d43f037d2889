"""gemma3: the text model of Gemma 3; every sixth layer reads all tokens, and has positions of its own."""

from collections.abc import Mapping
from typing import Any

import torch

from pliant.exporters.gguf.containers.gemma import Gemma
from pliant.exporters.gguf.containers.gemma2 import Gemma2
from pliant.exporters.gguf.plan import Unfit
from pliant.exporters.gguf.rope import rope_of
from pliant.exporters.gguf.source import Source


class Gemma3(Gemma2):
    name = "gemma3"
    models = ("gemma3_text",)
    head_norms = True
    tied = False
    period = (6, "sliding_window")
    largest = 62

    def check(self, source: Source, width: int) -> None:
        Gemma.check(self, source, width)
        for unread in ("attn_logit_softcapping", "use_bidirectional_attention"):
            if getattr(source.config, unread, None):
                raise Unfit(f"{self.name} has no {unread}")

    def rope(self, source: Source, width: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        keys, divisors = rope_of(source.config, width, "full_attention")
        local, _ = rope_of(source.config, width, "sliding_attention")
        rotated = {keys[".rope.dimension_count"], local[".rope.dimension_count"]}
        if divisors or ".rope.scaling.type" in local or rotated != {width}:
            raise Unfit(f"{self.name} has no keys for its rotary positions")
        return {**keys, ".rope.freq_base_swa": local[".rope.freq_base"]}, {}

    def more(self, source: Source) -> Mapping[str, Any]:
        cap = source.config.final_logit_softcapping
        window = {".attention.sliding_window": source.config.sliding_window}
        return window if cap is None else {**window, ".final_logit_softcapping": float(cap)}
