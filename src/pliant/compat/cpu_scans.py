"""Scans of state-space models for CPUs, in PyTorch.

That of Mamba-2 in transformers repeats B and C for every head and works in chunks of the model's size, which is meant
for GPUs. That of Mamba-1 computes the factors of all tokens before it begins. The step of Mamba-2 for a single token
computes the decay of a head anew for every element of its state, and allocates the state several times. Here B and C
stay once per group, a scan keeps the tensors of a few tokens in the caches of the CPU, and a step changes the state in
place.

A function returns None where it leaves a call to transformers.
"""

from __future__ import annotations

from typing import Any

CHUNK = 32  # tokens of a chunk of Mamba-2; twice as many for gradients, whose cost per chunk is higher
ELEMENTS = 2**18  # of a tensor of all states in a chunk of Mamba-1: 1 MiB in float32
FEWEST, MOST = 4, 64  # tokens of a chunk of Mamba-1
STEP = 2**12  # elements of a state; a step of a smaller one is faster in transformers


def _ours(tensor: Any) -> bool:
    """Whether a call on this tensor is computed here: on a CPU, neither compiled nor traced."""
    import torch

    from pliant.torch_private import observed

    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not observed()


def step_sizes(dt: Any, bias: Any, softplus: bool) -> Any:
    """The step sizes of a scan, in the dtype of ``dt``, as transformers computes them."""
    from torch.nn import functional

    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(dt) if softplus else dt


def mamba2_chunk_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """The scan of Mamba-2 (Dao and Gu, 2024, section 6), one chunk after another; None if it is left to transformers.

    Arguments:
        hidden_states: shape ``(batch, tokens, heads, head_dim)``.
        dt: shape ``(batch, tokens, heads)``.
        A, D, dt_bias: shape ``(heads,)``.
        B, C: shape ``(batch, tokens, groups, state)``; a state of size 0 leaves only the skip ``D``.
        chunk_size: that of the model. Most are meant for GPUs; gradients with chunks as short as those here are left
            to transformers, which computes all of them at once.
        initial_states: shape ``(batch, heads, head_dim, state)``.
    """
    import torch

    batch, tokens, heads, width = hidden_states.shape
    groups, size = B.shape[2:]
    x = hidden_states.float()
    skip = None if D is None else D[:, None].float()
    if size == 0:
        output = (x.new_zeros(x.shape) if skip is None else x * skip).contiguous()
        return (output, x.new_zeros(batch, heads, width, 0)) if return_final_states else output
    gradients = torch.is_grad_enabled()
    if not _ours(hidden_states) or (gradients and chunk_size <= CHUNK):
        return None
    shared = heads // groups
    dt = step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit).float()
    chunk = min(tokens, CHUNK * 2 if gradients else CHUNK)
    future = x.new_full((chunk, chunk), -torch.inf).triu_(1)
    state = x.new_zeros(batch, heads, width, size) if initial_states is None else initial_states.float()
    state = state.reshape(batch, groups, shared * width, size)
    outputs = []
    for rates, values, b, c in zip(
        *(tensor.split(chunk, 1) for tensor in (dt * A.float(), x * dt[..., None], B.float(), C.float())), strict=True
    ):
        values, b, c = (tensor.transpose(1, 2) for tensor in (values, b, c))  # (batch, heads or groups, chunk, …)
        count = rates.shape[1]
        decay = rates.transpose(1, 2).cumsum(-1)  # (batch, heads, chunk)
        weights = (decay[..., :, None] - decay[..., None, :]).add_(future[:count, :count]).exp_()
        weights = weights.view(batch, groups, shared, count, count) * (c @ b.transpose(-1, -2)).unsqueeze(2)
        carried = (c @ state.transpose(-1, -2)).view(batch, groups, count, shared, width).transpose(2, 3)
        carried = carried.reshape(batch, heads, count, width) * decay.exp()[..., None]
        outputs.append((weights.view(batch, heads, count, count) @ values + carried).transpose(1, 2))
        remaining = (decay[..., -1:] - decay).exp()[..., None]  # of a token's contribution at the end of the chunk
        added = (values * remaining).transpose(-1, -2).reshape(batch, groups, shared * width, count) @ b
        state = torch.addcmul(added, state, _per_row(decay[..., -1].exp(), groups, width))
    output = torch.cat(outputs, 1)
    output = output if skip is None else torch.addcmul(output, x, skip)
    output = output.contiguous()  # the mixer of falcon_h1 views heads and width as one dimension
    return (output, state.view(batch, heads, width, size)) if return_final_states else output


def _per_row(heads: Any, groups: int, width: int) -> Any:
    """Shape ``(batch, heads)`` as ``(batch, groups, heads of a group * width, 1)``: a value for each row of a state."""
    return heads[..., None].expand(-1, -1, width).reshape(len(heads), groups, -1, 1)


def mamba2_selective_state_update(
    state: Any,
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> Any:
    """One token of Mamba-2, which changes the state in place; None if it is left to transformers.

    Arguments:
        state: shape ``(batch, heads, head_dim, state)``; a state of size 0 leaves only the skip ``D``.
        hidden_states: shape ``(batch, heads, head_dim)``.
        dt, A, dt_bias: one number per head, expanded to shape ``(batch, heads, head_dim)``, ``(heads, head_dim,
            state)`` and ``(heads, head_dim)``.
        D: shape ``(heads, head_dim)``.
        B, C: shape ``(batch, groups, state)``.
    """
    import torch

    batch, heads, width, size = state.shape
    if size == 0:
        return _skipped(hidden_states, D, z)
    groups = B.shape[1]
    expanded = not any((dt.stride(2), *A.stride()[1:], 0 if dt_bias is None else dt_bias.stride(1)))
    single = state.dtype == torch.float32 and hidden_states.dtype != torch.float64
    in_place = state.is_contiguous() and not torch.is_grad_enabled()
    if z is not None or state.numel() < STEP or not (expanded and single and in_place and _ours(state)):
        return None
    dt = step_sizes(dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus).float()
    x = hidden_states.float()
    rows = state.view(batch * groups, -1, size)
    rows.mul_(_per_row((dt * A[:, 0, 0].float()).exp(), groups, width).view(batch * groups, -1, 1))
    rows.baddbmm_((x * dt[..., None]).view(batch * groups, -1, 1), B.float().reshape(batch * groups, 1, size))
    output = (rows @ C.float().reshape(batch * groups, size, 1)).view(batch, heads, width)
    output = output if D is None else output + x * D.float()
    return output.to(hidden_states.dtype)


def mamba_selective_state_update(
    state: Any,
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> Any:
    """One token of Mamba-1 without a state, of which only the skip ``D`` remains; None if there is a state.

    Arguments:
        state: shape ``(batch, channels, state)``.
        hidden_states, z: shape ``(batch, channels)``.
        D: shape ``(channels,)``.
    """
    return None if state.shape[-1] else _skipped(hidden_states, D, z)


def _skipped(x: Any, D: Any, z: Any) -> Any:
    """The output of a scan without a state: its input times the skip, and its gate."""
    import torch
    from torch.nn import functional

    output = torch.zeros_like(x) if D is None else x * D
    return (output if z is None else output * functional.silu(z)).to(x.dtype)


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
    use_associative_scan: bool = False,  # only transformers' compiled scan is an associative one
) -> Any:
    """The scan of Mamba-1 (Gu and Dao, 2023, section 3), one chunk after another; None if it is left to transformers.

    Arguments:
        hidden_states, dt, z: shape ``(batch, channels, tokens)``.
        A: shape ``(channels, state)``.
        B, C: shape ``(batch, state, tokens)``; a state of size 0 leaves only the skip ``D``.
        D, delta_bias: shape ``(channels,)``.
    """
    import torch
    from torch.nn import functional

    size = B.shape[1]
    state = torch.zeros(len(B), size, len(A), device=B.device)
    if size == 0:
        output = torch.zeros_like(hidden_states)
    elif use_mambapy or hidden_states.dtype == torch.float64 or not _ours(hidden_states):
        return None
    else:
        dt = step_sizes(dt, None if delta_bias is None else delta_bias[:, None], delta_softplus)
        dt = dt.float().permute(2, 0, 1).contiguous()  # (tokens, batch, channels)
        added = dt * hidden_states.float().permute(2, 0, 1)
        rates, b, c = A.float().t().contiguous(), B.float().permute(2, 0, 1), C.float().permute(2, 0, 1)
        chunk = max(FEWEST, min(MOST, ELEMENTS // state.numel()))
        gradients = torch.is_grad_enabled()
        outputs = []
        for steps, inputs, into, out_of in zip(*(tensor.split(chunk) for tensor in (dt, added, b, c)), strict=True):
            decay = (steps[:, :, None] * rates).exp_()  # (chunk, batch, state, channels)
            states = inputs[:, :, None] * into[..., None]
            computed = []
            for share, new in zip(decay.unbind(), states.unbind(), strict=True):
                state = torch.addcmul(new, share, state) if gradients else new.addcmul_(share, state)
                computed.append(state)
            outputs.append(out_of[:, :, None] @ (torch.stack(computed) if gradients else states))
        output = torch.cat(outputs)[:, :, 0].permute(1, 2, 0).to(hidden_states.dtype)
    output = output if D is None else output + hidden_states * D[:, None]
    output = output if z is None else output * functional.silu(z)
    return (output, state.transpose(1, 2).contiguous()) if return_last_state else output
