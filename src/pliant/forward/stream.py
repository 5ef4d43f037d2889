"""Run a stretch of a model's layers on given hidden states.

The model's own forward does everything else (masks, positions, final norm, head), so no family needs code here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy, layers_of


class Stream:
    """The residual stream of a causal language model, entered and left at layer boundaries.

    Boundary ``i`` is before layer ``i``; the last one, ``depth``, is before the final norm.

    Arguments:
        model: a causal language model.
    """

    def __init__(self, model: Any, anatomy: Anatomy):
        self.model = model
        self.layers = layers_of(model, anatomy.source)
        self._tuples = anatomy.architecture.returns_tuple

    def logits(self, ids: torch.Tensor, start: int = 0, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Logits from the hidden state at boundary ``start``, shape ``(batch, seqlen, vocabulary)``.

        Arguments:
            ids: token ids, shape ``(batch, seqlen)``, which determine positions and masks.
            hidden: shape ``(batch, seqlen, hidden)``; None at boundary 0, where the embeddings are computed.
        """
        with self._entered(start, len(self.layers), hidden):
            return self.model(input_ids=ids, use_cache=False).logits

    def parts(
        self, ids: torch.Tensor, tokens: int, start: int = 0, hidden: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """:meth:`logits` for ``tokens`` positions at a time, each with the slice of its positions."""
        seqlen, depth = ids.shape[1], len(self.layers)
        if seqlen <= tokens:
            yield slice(0, seqlen), self.logits(ids, start, hidden)
            return
        if hidden is None or start < depth:
            hidden = self.through(ids, start, depth, hidden)
        for first in range(0, seqlen, tokens):
            where = slice(first, min(first + tokens, seqlen))
            yield where, self.logits(ids[:, where], depth, hidden[:, where])

    def through(self, ids: torch.Tensor, start: int, end: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states at the boundary ``end``."""
        return self.run(ids, start, end, hidden, at=(end,))[end]

    def run(
        self,
        ids: torch.Tensor,
        start: int,
        end: int,
        hidden: torch.Tensor | None = None,
        at: Iterable[int] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Hidden states at the boundaries ``start + 1 … end``, or only at those in ``at``."""
        outputs: dict[int, torch.Tensor] = {}

        def record(boundary: int):
            def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
                outputs[boundary] = output[0] if isinstance(output, tuple) else output

            return hook

        boundaries = range(start + 1, end + 1) if at is None else at
        handles = [self.layers[i - 1].register_forward_hook(record(i)) for i in boundaries]
        try:
            with self._entered(start, end, hidden):
                self.model.base_model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @contextmanager
    def _entered(self, start: int, end: int, hidden: torch.Tensor | None) -> Iterator[None]:
        """Context in which the model runs only layers ``start … end - 1``, from the given hidden state."""
        layers = self.layers
        replaced = {i: layers[i] for i in range(len(layers)) if i < start or i >= end}
        try:
            for i in replaced:
                layers[i] = _Enter(layers[i], hidden if i == start - 1 else None, self._tuples)
            yield
        finally:
            for i, layer in replaced.items():
                layers[i] = layer


class _Enter(nn.Module):
    """Replaces a layer that is not run: returns its input, or a given hidden state.

    Everything else that the model reads from the layer, such as its type, is that of the layer.
    """

    def __init__(self, layer: nn.Module, hidden: torch.Tensor | None, returns_tuple: bool):
        super().__init__()
        self.hidden, self.returns_tuple = hidden, returns_tuple
        self.__dict__["_layer"] = layer  # not a submodule: its parameters do not run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> Any:  # noqa: ARG002 - any layer's arguments
        out = hidden_states if self.hidden is None else self.hidden
        return (out, None) if self.returns_tuple else out
