"""The scan of state-space models on a CPU, in chunks of matrix products, and scans whose state was removed.

transformers runs its reference scan on a CPU. It repeats B and C for every head and works in chunks of the model's
size, which is meant for GPUs. Here B and C stay once per group, and a chunk is ``CHUNK`` tokens long. The functions
that transformers' mixers call are replaced in the modeling files when these are imported. A call that has an unknown
argument or tensors on another device, or that is compiled or traced, goes to transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pliant.architecture.format import EMPTY_STATE

CHUNK = 64  # tokens
_UNUSED = {"output_router_logits"}  # arguments of the whole model that its mixers hand on

Watch = Callable[[Any, Any], None]
_watches: list[Watch] = []


@contextmanager
def watched_scans(watch: Watch) -> Iterator[None]:
    """Context in which every scan of a sequence shows its input and its output to ``watch``.

    Both have the shape ``(batch, tokens, units, width)``: heads, or the channels of Mamba-1, whose width is 1. The output
    contains the skip ``D``, but not yet the gate.
    """
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def wrap_scans(module: ModuleType) -> None:
    """Replace the scan functions that a modeling file has."""
    for name, (scan, by_unit) in _SCANS.items():
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, EMPTY_STATE):
            setattr(module, name, _wrapped(original, scan, by_unit))


def _wrapped(
    original: Callable[..., Any], scan: Callable[..., Any], by_unit: Callable[[Any], Any]
) -> Callable[..., Any]:
    parameters = inspect.signature(scan)

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        if _watches:
            output = result if kwargs.get("z") is None else compute(*args, **{**kwargs, "z": None})
            for watch in _watches:
                watch(by_unit(args[0]), by_unit(output[0] if isinstance(output, tuple) else output))
        return result

    def compute(*args: Any, **kwargs: Any) -> Any:
        try:
            given = {name: value for name, value in kwargs.items() if value is not None and name not in _UNUSED}
            bound = parameters.bind(*args, **given)
        except TypeError:  # an argument that the scan does not know
            return original(*args, **kwargs)
        result = scan(*bound.args, **bound.kwargs)
        return original(*args, **kwargs) if result is None else result

    setattr(run, EMPTY_STATE, True)
    return run


def mamba2_chunk_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int = CHUNK,  # that of the model, which is meant for GPUs
    D: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """The scan of Mamba-2 (Dao and Gu, 2024, section 6); None on another device, or while torch compiles or traces.

    Arguments:
        hidden_states: shape ``(batch, tokens, heads, head_dim)``.
        dt: shape ``(batch, tokens, heads)``.
        A, D, dt_bias: shape ``(heads,)``.
        B, C: shape ``(batch, tokens, groups, state)``; a state of size 0 leaves only the skip ``D``.
        initial_states: shape ``(batch, heads, head_dim, state)``.
    """
    import torch
    from torch.nn import functional

    from pliant.torch_private import observed

    batch, tokens, heads, width = hidden_states.shape
    groups, state = B.shape[2:]
    x = hidden_states.float()
    skip = 0 if D is None else x * D[:, None].float()
    if state == 0:
        output = (x.new_zeros(x.shape) + skip).contiguous()
        return (output, x.new_zeros(batch, heads, width, 0)) if return_final_states else output
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or observed():
        return None
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    chunk = min(CHUNK, tokens)
    padding = -tokens % chunk
    count, shared = (tokens + padding) // chunk, heads // groups

    def chunks(tensor: Any, *shape: int) -> Any:
        """Shape ``(batch, tokens, n, …)`` as ``(batch, chunks, n, chunk, …)``."""
        padded = functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
        return padded.view(batch, count, chunk, *shape).transpose(2, 3)

    decay = chunks(dt * A.float(), heads).cumsum(-1)  # (batch, chunks, heads, chunk)
    x = chunks(x * dt[..., None], heads, width)  # (batch, chunks, heads, chunk, width)
    B, C = chunks(B.float(), groups, state), chunks(C.float(), groups, state)  # (batch, chunks, groups, chunk, state)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weights = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()
    weights = weights.view(batch, count, groups, shared, chunk, chunk) * (C @ B.transpose(-1, -2)).unsqueeze(3)
    output = weights.view(batch, count, heads, chunk, chunk) @ x

    left = (decay[..., -1:] - decay).exp()  # of a token's contribution at the end of its chunk
    added = (x * left[..., None]).transpose(-1, -2).reshape(batch, count, groups, shared * width, chunk) @ B
    added = added.view(batch, count, heads, width, state)
    whole = decay[..., -1].exp()[..., None, None]
    now = x.new_zeros(batch, heads, width, state) if initial_states is None else initial_states.float()
    before = []
    for number in range(count):
        before.append(now)
        now = now * whole[:, number] + added[:, number]
    carried = C @ torch.stack(before, 1).view(batch, count, groups, shared * width, state).transpose(-1, -2)
    carried = carried.view(batch, count, groups, chunk, shared, width).transpose(3, 4)
    output = output + carried.reshape(batch, count, heads, chunk, width) * decay.exp()[..., None]
    output = output.transpose(2, 3).reshape(batch, -1, heads, width)[:, :tokens] + skip
    output = output.contiguous()  # the mixer of falcon_h1 views heads and width as one dimension
    return (output, now) if return_final_states else output


def mamba_selective_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> Any:
    """The scan of Mamba-1 without its state, or None if it has one.

    Arguments:
        hidden_states, z: shape ``(batch, channels, tokens)``.
        B: shape ``(batch, state, tokens)``.
        D: shape ``(channels,)``.
    """
    from torch.nn import functional

    if B.shape[1]:
        return None
    output = hidden_states * (0 if D is None else D[:, None])
    if z is not None:
        output = output * functional.silu(z)
    state = hidden_states.new_zeros(*hidden_states.shape[:2], 0)
    return (output, state) if return_last_state else output


_SCANS = {
    "mamba2_chunk_scan": (mamba2_chunk_scan, lambda x: x),
    "mamba_selective_scan": (mamba_selective_scan, lambda x: x.transpose(1, 2).unsqueeze(-1)),
}
"""Name in the modeling files -> pliant's scan, and what brings its input and output into one shape for watching."""
