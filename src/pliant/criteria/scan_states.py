"""The state of scans, which no matrix reads: observe what each of its units adds to the output.

A scan returns the sum of ``C_n h_n`` over the units n of its state. A factor on C_n is therefore a factor on the unit:
with 0 the unit is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from pliant.anatomy import Block
from pliant.compat.scan import ScanInputs, watched_scan_inputs
from pliant.device import to_float64


@contextmanager
def watching_states(
    layers: nn.ModuleList, blocks: Sequence[Block], watch: Callable[[Block, ScanInputs], torch.Tensor]
) -> Iterator[None]:
    """While inside, ``watch`` sees the inputs of the scan of each of ``blocks``, and returns the C that the scan goes
    on with."""
    running: list[Block] = []

    def seen(inputs: ScanInputs) -> torch.Tensor:
        axis = running[-1].state_axis if running else None
        if axis is None or inputs.C.shape[2:] != (axis.copies, axis.size) or axis.size == 0:
            return inputs.C
        return watch(running[-1], inputs)

    with ExitStack() as stack:
        for block in blocks:
            module = layers[block.layer].get_submodule(block.spec.module)
            enter = module.register_forward_pre_hook(lambda *_, block=block: running.append(block))
            leave = module.register_forward_hook(lambda *_: running.clear(), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(watched_scan_inputs(seen))
        yield


def state_squares(inputs: ScanInputs) -> torch.Tensor:
    """Sum of squares, over tokens and channels, of what each unit of a state adds to the output of the scan.

    Returns:
        ``(C_n h_n)^2`` of the copy that each group has of the unit; float64, shape ``(groups, state)``.
    """
    x, dt, a, b, c = (tensor.float() for tensor in inputs)
    batch, tokens, heads, width = x.shape
    groups, state = b.shape[2:]
    decay = (dt.unsqueeze(-1) * a).exp().view(batch, tokens, groups, heads // groups, 1, -1)
    added = (x * dt.unsqueeze(-1)).view(batch, tokens, groups, heads // groups, width, 1)
    b, squares = b.view(batch, tokens, groups, 1, 1, state), c.square()
    h = x.new_zeros(batch, groups, heads // groups, width, state)
    total: torch.Tensor = torch.zeros(groups, state, dtype=torch.float64)
    for token in range(tokens):
        h = h * decay[:, token] + added[:, token] * b[:, token]
        total += to_float64((h.square().sum((2, 3)) * squares[:, token]).sum(0)).cpu()
    return total
