"""The module that stands where a block was removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn


class Null(nn.Module):
    """Changes nothing in the residual stream.

    It returns zeros shaped like its input; or, where the module it replaces adds the residual itself, that residual.

    Arguments:
        returns_tuple: whether the module it replaces returns ``(tensor, None)``, as attention does.
        residual: which argument the module adds to; None when its layer does the adding.
        guard: path of a weight of the module it replaces. A tensor of one element takes its name, so that whoever loads the
            weights into a model that still has the module gets a size mismatch.
        attention: whether it replaces an attention module, which would have returned attention weights.
    """

    on_attention: ClassVar[list[Callable[[], None]]] = []
    """Functions called whenever a null module that replaces an attention runs."""

    def __init__(
        self,
        returns_tuple: bool = False,
        residual: int | None = None,
        guard: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.attention = attention
        self.returns_tuple = returns_tuple
        self.residual = residual
        self.guard = guard
        if guard is not None:
            owner: nn.Module = self
            *holders, name = guard.split(".")
            for holder in holders:
                owner.add_module(holder, nn.Module())
                owner = owner.get_submodule(holder)
            owner.register_buffer(name, torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):  # noqa: ARG002 - takes what any block takes
        if self.attention:
            for call in self.on_attention:
                call()
        given = (hidden_states, *args)
        out = torch.zeros_like(hidden_states) if self.residual is None else given[self.residual]
        return (out, None) if self.returns_tuple else out
