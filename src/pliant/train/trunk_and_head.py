"""The two parts of a causal language model: a trunk, from token ids to final hidden states, and a head, from there to
logits.

Logits are by far the largest tensor of a training step. With a separate head they can be computed for a few tokens at a
time, and only for tokens whose prediction counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pliant.anatomy import agree
from pliant.errors import ArchitectureError
from pliant.forward.windows import check_model
from pliant.torch_private import copy_with_child


class Halves:
    """A model's trunk and head: ``halves.trunk(ids, mask)`` computes hidden states, ``halves.head(hidden)`` their
    logits.

    The head is the model's own forward on top of a stand-in for the trunk, so it includes all that a family does to its
    logits (soft caps, scales). The model itself is not changed; both halves read its tensors.

    Raises:
        ArchitectureError: the model does not predict next tokens, or its logits depend on more than its final hidden
            states.
    """

    def __init__(self, model: Any):
        check_model(model)
        self._trunk = model.base_model
        self._head = copy_with_child(model, model.base_model_prefix, _Given(model.base_model))
        was = model.training
        model.eval()
        ids = torch.tensor([[1, 2]], device=model.device)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            parts = self.head(self.trunk(ids, mask)[0])
        model.train(was)
        if not agree(parts.nan_to_num(), whole[0].nan_to_num(), next(model.parameters()).dtype):
            raise ArchitectureError(
                f"the logits of {type(model).__name__} depend on more than its final hidden states, so it cannot be "
                "trained"
            )

    def trunk(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Final hidden states, shape ``(sequences, tokens, hidden)``, of token ids of shape ``(sequences, tokens)``."""
        return self._trunk(input_ids=ids, attention_mask=mask, use_cache=False)[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of shape ``(tokens, vocabulary)`` of hidden states of shape ``(tokens, hidden)``."""
        return self._head(inputs_embeds=hidden[None], use_cache=False).logits.squeeze(0)


class _Given(nn.Module):
    """A stand-in for the trunk, or for any part of it that a head calls (``model.decoder``).

    It returns the hidden states that it receives as embeddings. Numbers that a head reads from the trunk, such as a
    factor on the logits, are those of the trunk.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.__dict__["_trunk"] = trunk  # not a submodule: it does not run

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Output:  # noqa: ARG002
        return _Output(inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        value = getattr(self._trunk, name, None)
        return value if isinstance(value, int | float) else self


class _Output:
    """The output of a trunk: the last hidden state, and None under every other name."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int) -> torch.Tensor:
        return (self.last_hidden_state,)[place]
