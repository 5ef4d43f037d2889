"""Score sub-networks of one model on fixed text, re-using what they have in common.

Sub-networks that agree on their first layers compute the same hidden states there. A ``Walk`` remembers the hidden state
at every layer boundary of a base sub-network; a candidate starts from the boundary before the first layer in which it
differs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.elastic import Elastic, Subnet
from pliant.errors import DataError
from pliant.measure.score import METRICS, kl, nll
from pliant.measure.stream import Stream
from pliant.measure.windows import batches_of


class Walk:
    """Scores sub-networks on token windows.

    Arguments:
        model: a causal language model; it is put into evaluation mode.
        windows: token ids, shape ``(windows, seqlen)``.
        metric: ``perplexity`` (the score is the log of it) or ``kl`` (to the dense model).
        reuse: False runs every layer for every score, as a reference.
        memory: bytes that hidden states may take; with less, every k-th boundary is kept and the rest recomputed.

    Attributes:
        evaluations: scores computed so far.
        block_forwards: residual blocks run so far, in passes over all windows.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        windows: torch.Tensor,
        *,
        metric: str = "perplexity",
        reuse: bool = True,
        memory: int | None = None,
    ):
        if metric not in METRICS:
            raise DataError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}")
        self.model, self.anatomy, self.metric, self.reuse = model.eval(), anatomy, metric, reuse
        self.batches = batches_of(model, windows)
        self.evaluations = 0
        self.block_forwards = 0.0
        self.elastic = Elastic(model, anatomy)
        self.stream = Stream(model, anatomy)
        self._base = Subnet()
        self._known = 0  # boundaries 1 … _known of the base are remembered
        self._hidden: list[dict[int, torch.Tensor]] = [{} for _ in self.batches]
        self._stride = 1
        whole = store_bytes(model, anatomy, windows.numel())
        while memory is not None and whole / self._stride > memory and self._stride < anatomy.depth:
            self._stride += 1
        self._dense: list[torch.Tensor] = []

    def rebase(self, subnet: Subnet) -> None:
        """Make ``subnet`` the one whose prefix is remembered; what it shares with the base so far stays known."""
        self._forget_after(self._divergence(subnet))
        self._base = subnet

    @torch.inference_mode()
    def score(self, subnet: Subnet, share: float = 1.0) -> float:
        """Mean loss in nats per token of ``subnet`` on the first ``share`` of the windows; NaN where there is no number."""
        if self.metric == "kl" and not self._dense:
            self._dense = self._dense_ends()
        start = 0
        if self.reuse:
            start = self._divergence(subnet) // self._stride * self._stride
            self._extend(start)
        self.elastic.activate(subnet)
        total, count = 0.0, 0
        batches = self.batches[: math.ceil(share * len(self.batches))]
        for number, ids in enumerate(batches):
            logits = self.stream.logits(ids, start, self._hidden[number].get(start))
            if self.metric == "kl":
                reference = self.stream.logits(ids, self.anatomy.depth, self._dense[number])
                losses = kl(logits, reference)
            else:
                losses = nll(logits, ids)
            total, count = total + losses.sum().item(), count + len(losses)
        self._count(subnet, start, self.anatomy.depth, len(batches) / len(self.batches))
        self.evaluations += 1
        return total / count

    def close(self) -> None:
        """Put the model back as it was and forget the hidden states."""
        self.elastic.activate(Subnet())
        self._forget_after(0)

    def _divergence(self, subnet: Subnet) -> int:
        """The first layer in which ``subnet`` differs from the base; the depth when it does not."""
        skipped = subnet.skip ^ self._base.skip
        narrowed = {axis for axis, _ in {*subnet.keep} ^ {*self._base.keep}}
        differ = (
            block.layer
            for block in self.anatomy.blocks.values()
            if block.name in skipped or any(axis.name in narrowed for axis in block.leaders)
        )
        return min(differ, default=self.anatomy.depth)

    def _extend(self, boundary: int) -> None:
        """Run the base from what is known to ``boundary``."""
        if boundary <= self._known:
            return
        self.elastic.activate(self._base)
        for number, ids in enumerate(self.batches):
            outputs = self.stream.run(ids, self._known, boundary, self._hidden[number].get(self._known))
            self._hidden[number].update({b: h for b, h in outputs.items() if b % self._stride == 0})
        self._count(self._base, self._known, boundary)
        self._known = boundary

    def _forget_after(self, boundary: int) -> None:
        self._known = min(self._known, boundary // self._stride * self._stride)
        for hidden in self._hidden:
            for later in [b for b in hidden if b > self._known]:
                del hidden[later]

    def _count(self, subnet: Subnet, start: int, end: int, share: float = 1.0) -> None:
        self.block_forwards += share * sum(
            start <= block.layer < end and block.name not in subnet.skip for block in self.anatomy.blocks.values()
        )

    @torch.inference_mode()
    def _dense_ends(self) -> list[torch.Tensor]:
        """The hidden state after the last layer of the dense model, for every batch."""
        depth = self.anatomy.depth
        self.elastic.activate(Subnet())
        self._count(Subnet(), 0, depth)
        return [self.stream.run(ids, 0, depth)[depth] for ids in self.batches]


def store_bytes(model: Any, anatomy: Anatomy, tokens: int) -> int:
    """Bytes of the hidden states of ``tokens`` tokens at every layer boundary."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return tokens * hidden * next(model.parameters()).element_size() * anatomy.depth
