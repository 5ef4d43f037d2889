"""The private names of torch that are used below ``compat``; ``tests/test_torch_private.py`` tests each of them.

This module is not in ``compat`` because the packed layers and the anatomy, which are below ``compat``, use it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

CALL_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_tracing = torch._C._is_tracing


def forward_differentiation() -> bool:
    """Whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def observed() -> bool:
    """Whether a mode of torch, a transform of ``torch.func``, a trace or forward-mode differentiation is active.

    They would miss a direct call of the kernels, which bypasses torch's dispatcher.
    """
    return bool(
        _dispatch_modes() or _function_modes() or _transform() is not None or _tracing() or forward_differentiation()
    )


def share_call_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the forward and backward hooks of ``source``: the same dicts, so that their handles still remove
    them."""
    for hooks in CALL_HOOKS:
        vars(target)[hooks] = vars(source)[hooks]


def has_state_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run when its state is saved or loaded."""
    return any(vars(module).get(hooks) for hooks in STATE_HOOKS)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile`` has wrapped a module."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def own_tensors(module: nn.Module, buffers: bool = False) -> dict[str, Any]:
    """The dict in which a module holds its own parameters or buffers.

    ``setattr`` accepts only a Parameter where there was one; a view must stay attached to its tensor.
    """
    return module._buffers if buffers else module._parameters


def copy_with_child(module: nn.Module, name: str, child: nn.Module) -> Any:
    """A shallow copy of a module in which one child is replaced."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: child}
    return copied


def operator_name(target: Any) -> str:
    """``add_`` for ``aten.add_.Tensor``; an empty string for anything but an operator of torch."""
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def operator_arguments(target: Any) -> Sequence[Any]:
    """The declared arguments of an operator, each with ``name`` and ``default_value``; none for anything else."""
    return target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
