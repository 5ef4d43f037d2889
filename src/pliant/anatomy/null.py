"""The module that stands where a block was removed."""

from __future__ import annotations

import torch
from torch import nn


class Null(nn.Module):
    """Adds nothing to the residual stream: returns zeros shaped like its input, without allocating them.

    Arguments:
        returns_tuple: whether the module it replaces returns ``(tensor, None)``, as attention does.
    """

    def __init__(self, returns_tuple: bool = False):
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):  # noqa: ARG002 - takes what any block takes
        zeros = hidden_states.new_zeros(()).expand_as(hidden_states)
        return (zeros, None) if self.returns_tuple else zeros
