"""Whether torch watches or changes operations around a call, so that a call of the kernels outside its dispatcher would escape it.

It stands below ``compat`` because packed layers need it at every call. The private names of torch in it have a test.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_tracing = torch._C._is_tracing


def observed() -> bool:
    """Whether a mode of torch, a transform of ``torch.func``, a trace or forward-mode differentiation is active."""
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _tracing()
        or forward_ad._current_level >= 0
    )
