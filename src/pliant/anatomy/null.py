"""The module that replaces a removed block."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn


class Null(nn.Module):
    """Leaves the residual stream unchanged.

    It returns zeros shaped like its input; or, if the module it replaces adds the residual itself, that residual.

    Arguments:
        returns_tuple: whether the module it replaces returns ``(tensor, None)``, as attention does.
        residual: the argument to which the module adds; None if its layer adds.
        guard: path of a weight of the module it replaces. A tensor of one element gets this path, so that loading the
            weights into a model that still has the module fails with a size mismatch.
        attention: whether it replaces an attention module, which would have returned attention weights.
        passes: number of first elements of its input that it returns instead of zeros.
        counts: the call argument that names a cache slot, to which it adds a key of width 1 for each token.
    """

    on_attention: ClassVar[list[Callable[[], None]]] = []
    """Functions called whenever a null module that replaces an attention runs."""

    def __init__(
        self,
        returns_tuple: bool = False,
        residual: int | None = None,
        guard: str | None = None,
        attention: bool = False,
        passes: int | None = None,
        counts: str | None = None,
    ):
        super().__init__()
        self.attention = attention
        self.returns_tuple = returns_tuple
        self.residual = residual
        self.guard = guard
        self.passes = passes
        self.counts = counts
        if guard is not None:
            owner: nn.Module = self
            *holders, name = guard.split(".")
            for holder in holders:
                owner.add_module(holder, nn.Module())
                owner = owner.get_submodule(holder)
            owner.register_buffer(name, torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        if self.attention:
            for call in self.on_attention:
                call()
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if self.counts is not None and cache is not None:
            key = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(key, key, kwargs[self.counts])
        if self.passes is not None:
            out = hidden_states[..., : self.passes]
        else:
            out = torch.zeros_like(hidden_states) if self.residual is None else (hidden_states, *args)[self.residual]
        return (out, None) if self.returns_tuple else out


class NullNorm(nn.Module):
    """The module in place of a norm that went with its block: it passes its input on.

    Some layers cast to the dtype of the norm's weight, so it has an empty one.

    Arguments:
        replaced: the module that it replaces.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        dtypes = (tensor.dtype for tensor in replaced.parameters() if tensor.is_floating_point())
        self._dtype = next(dtypes, torch.get_default_dtype())

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states

    @property
    def weight(self) -> torch.Tensor:
        return torch.empty(0, dtype=self._dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NullNorm:
        self._dtype = fn(self.weight).dtype
        return super()._apply(fn, recurse)
