"""Score sub-networks of one model on fixed text, re-using the hidden states of shared prefixes.

Sub-networks that agree on their first layers compute the same hidden states there. A ``PrefixScorer`` remembers the
hidden state at every layer boundary of a base sub-network; a candidate starts from the boundary before the first layer
in which it differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pliant.anatomy import Anatomy, layers_of
from pliant.device import free_memory
from pliant.elastic import Elastic, Subnet
from pliant.errors import MemoryLimitError
from pliant.formatting import human_bytes
from pliant.forward.losses import TOKENS_AT_A_TIME
from pliant.forward.stream import Stream
from pliant.forward.windows import batches_of, tokens_at_once, within_memory
from pliant.measure.scores import Score, loss_of, score_of
from pliant.pages import NEAR, pages_of


class PrefixScorer:
    """Scores sub-networks on token windows, by any score of logits.

    Arguments:
        model: a causal language model; it is put into evaluation mode.
        windows: token ids, shape ``(windows, seqlen)``.
        metric: a score of logits, or its name.
        reuse: False runs every layer for every score, as a reference.
        memory: limit of bytes for hidden states; if they need more, every k-th boundary is kept and the rest
            recomputed.
        stretch: number of layers that all windows go through before the next layers are run; default: all. If the
            weights are in files, as many as memory holds, so that each is read once for all windows.
        tokens: tokens per forward pass; default: :func:`pliant.forward.windows.tokens_at_once`. If the device runs out
            of memory, this is halved for the rest of the search, and only every second boundary is kept.
        elastic: that of another scorer of the same model, if the two are used in turn.

    Attributes:
        tokens: as above.
        evaluations: number of scores computed so far.
        block_forwards: number of residual blocks run so far, in passes over all windows.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        windows: torch.Tensor,
        *,
        metric: str | Score = "perplexity",
        reuse: bool = True,
        memory: int | None = None,
        stretch: int | None = None,
        tokens: int | None = None,
        elastic: Elastic | None = None,
    ):
        self.model, self.anatomy, self.metric, self.reuse = model.eval(), anatomy, score_of(metric), reuse
        self._windows = windows
        self.evaluations = 0
        self.block_forwards = 0.0
        self.elastic = elastic or Elastic(model, anatomy)
        self.stream = Stream(model, anatomy)
        self._base = Subnet()
        self._known = 0  # boundaries 1 … _known of the base are stored
        self._stride = 1
        whole = store_bytes(model, anatomy, windows.numel())
        while memory is not None and whole / self._stride > memory and self._stride < anatomy.depth:
            self._stride += 1
        self._stretch = stretch or anatomy.depth
        self._split(tokens or tokens_at_once(model))
        if pages_of(model) is None:
            self._parts = windows.shape[1]

    def rebase(self, subnet: Subnet) -> None:
        """Make ``subnet`` the base; hidden states that it shares with the previous base are kept."""
        self._forget_after(self._divergence(subnet))
        self._base = subnet

    def score(self, subnet: Subnet) -> float:
        """The loss of ``subnet``: its mean score over the windows, negated if higher is better; it may be NaN."""

        def scored(tokens: int) -> float:
            if tokens != self.tokens:
                self._stride = min(self.anatomy.depth, 2 * self._stride)
                self._split(tokens)
            return self._score(subnet)

        return within_memory(self.model, scored, self.tokens)

    def _split(self, tokens: int) -> None:
        """Cut the windows into batches of ``tokens`` tokens, and logits into as many positions; discard all hidden
        states."""
        self.tokens = self._parts = tokens
        self.batches = batches_of(self.model, self._windows, tokens)
        self._hidden: list[dict[int, torch.Tensor]] = [{} for _ in self.batches]
        self._known = 0
        self._dense: list[torch.Tensor] = []

    @torch.inference_mode()
    def _score(self, subnet: Subnet) -> float:
        if self.metric.needs_reference and not self._dense:
            self._dense = self._dense_ends()
        start = 0
        if self.reuse:
            start = self._divergence(subnet) // self._stride * self._stride
            self._extend(start)
        self.elastic.activate(subnet)
        total, count = 0.0, 0
        entered = [hidden.get(start) for hidden in self._hidden]
        first, depth = start, self.anatomy.depth
        while depth - first > self._stretch:
            entered = self._through(self.batches, first, first + self._stretch, entered)
            first += self._stretch
        for number, ids in enumerate(self.batches):
            for where, logits in self.stream.parts(ids, self._parts, first, entered[number]):
                reference = None
                if self.metric.needs_reference:
                    reference = self.stream.logits(ids[:, where], depth, self._dense[number][:, where])
                of_part, tokens = self.metric.batch(logits, ids[:, where.start + 1 : where.stop + 1], reference)
                total, count = total + of_part, count + tokens
        self._count(subnet, start, depth)
        self.evaluations += 1
        return loss_of(self.metric, total, count)

    def close(self) -> None:
        """Restore the dense model and discard the hidden states."""
        self.elastic.activate(Subnet())
        self._forget_after(0)

    def _divergence(self, subnet: Subnet) -> int:
        """The first layer in which ``subnet`` differs from the base; the depth if it does not."""
        skipped = subnet.skip ^ self._base.skip
        narrowed = {axis for axis, _ in {*subnet.keep} ^ {*self._base.keep}}
        differ = (
            block.layer
            for block in self.anatomy.blocks.values()
            if block.name in skipped or any(axis.name in narrowed for axis in block.leaders)
        )
        return min(differ, default=self.anatomy.depth)

    def _extend(self, boundary: int) -> None:
        """Run the base from its last stored boundary to ``boundary``."""
        if boundary <= self._known:
            return
        self.elastic.activate(self._base)
        entered = [hidden.get(self._known) for hidden in self._hidden]
        for first in range(self._known, boundary, self._stretch):
            last = min(boundary, first + self._stretch)
            for number, ids in enumerate(self.batches):
                boundaries = {b for b in range(first + 1, last + 1) if b % self._stride == 0}
                outputs = self.stream.run(ids, first, last, entered[number], at=boundaries | {last})
                self._hidden[number].update({b: outputs[b] for b in boundaries})
                entered[number] = outputs[last]
        self._count(self._base, self._known, boundary)
        self._known = boundary

    def _forget_after(self, boundary: int) -> None:
        self._known = min(self._known, boundary // self._stride * self._stride)
        for hidden in self._hidden:
            for later in [b for b in hidden if b > self._known]:
                del hidden[later]

    def _count(self, subnet: Subnet, start: int, end: int) -> None:
        self.block_forwards += sum(start <= block.layer < end for block in self.anatomy.alive(subnet.skip))

    @torch.inference_mode()
    def _dense_ends(self) -> list[torch.Tensor]:
        """The hidden state after the last layer of the dense model, for every batch."""
        depth = self.anatomy.depth
        self.elastic.activate(Subnet())
        self._count(Subnet(), 0, depth)
        hidden: list[torch.Tensor | None] = [None] * len(self.batches)
        for first in range(0, depth, self._stretch):
            hidden = self._through(self.batches, first, min(depth, first + self._stretch), hidden)
        return [state for state in hidden if state is not None]

    def _through(
        self, batches: list[torch.Tensor], first: int, last: int, entered: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Run every batch through some layers of the active sub-network."""
        return [self.stream.through(ids, first, last, hidden) for ids, hidden in zip(batches, entered, strict=True)]


@dataclass(frozen=True)
class Footprint:
    """Memory that scoring takes, in bytes.

    Attributes:
        weights: all weights; of weights in files, those needed at a time: ``stretch`` layers and the largest other
            tensor.
        hidden: stored hidden states.
        logits: logits and the temporary tensors of the loss.
        stretch: as for :class:`PrefixScorer`.
    """

    weights: int
    hidden: int
    logits: int
    stretch: int

    @property
    def total(self) -> int:
        return self.weights + self.hidden + self.logits


def footprint(model: Any, anatomy: Anatomy, windows: torch.Tensor, metric: str | Score) -> Footprint:
    """Memory that a :class:`PrefixScorer` over ``windows`` will take.

    Raises:
        MemoryLimitError: the weights are in files, and the memory limit is too low.
    """
    whole = sum(p.nbytes for p in model.parameters())
    hidden = store_bytes(model, anatomy, windows.numel())
    pages = pages_of(model)
    seqlen, at_once = windows.shape[1], tokens_at_once(model)
    tokens = min(windows.numel(), max(seqlen, at_once // seqlen * seqlen) if pages is None else at_once)
    vocabulary, element = model.get_input_embeddings().num_embeddings, next(model.parameters()).element_size()
    # in parts, the previous ones are still there
    copies = score_of(metric).logits_copies * (2 if tokens < seqlen else 1)
    logits = copies * vocabulary * (tokens * element + min(tokens, TOKENS_AT_A_TIME) * 8)
    if pages is None:
        free = free_memory(next(model.parameters()).device)
        if free is not None:  # boundaries that do not fit are recomputed
            hidden = max(hidden // anatomy.depth, min(hidden, free // 2))
        return Footprint(whole, hidden, logits, anatomy.depth)
    layers = layers_of(model, anatomy.source)
    each = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    inside = {id(p) for p in layers.parameters()}
    largest = max((p.nbytes for p in model.parameters() if id(p) not in inside), default=0)
    hidden = max(hidden // anatomy.depth, min(hidden, pages.limit // 4))
    room = int(NEAR * pages.limit) - largest - logits - hidden
    stretch = max(1, min(anatomy.depth, room // each))
    needs = Footprint(min(whole, largest + stretch * each), hidden, logits, stretch)
    if needs.total > pages.limit:
        raise MemoryLimitError(
            f"the limit of {human_bytes(pages.limit)} is too low for windows of {seqlen} tokens: weights take at "
            f"least {human_bytes(needs.weights)}, hidden states {human_bytes(hidden)}, logits {human_bytes(logits)}; "
            "give a smaller seqlen, fewer samples, or more memory"
        )
    return needs


def store_bytes(model: Any, anatomy: Anatomy, tokens: int) -> int:
    """Bytes of the hidden states of ``tokens`` tokens at every layer boundary."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return tokens * hidden * next(model.parameters()).element_size() * anatomy.depth
