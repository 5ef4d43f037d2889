"""The tensors of a gated MLP or of a stack of gated experts."""

from __future__ import annotations

from collections.abc import Mapping

from pliant.anatomy import Block
from pliant.exporters.gguf.containers.decoder import MLP
from pliant.exporters.gguf.plan import Tensor, Unfit
from pliant.exporters.gguf.source import Source

EXPERTS = {role: f"{name}_exps" for role, name in MLP.items()}
SHARED = {role: f"{name}_shexp" for role, name in MLP.items()}
ROUTER = "ffn_gate_inp.weight"


def tensors_of(
    source: Source,
    block: Block | None,
    names: Mapping[str, str],
    width: int,
    factors: Mapping[str, float],
    stack: tuple[int, ...] = (),
    prefix: str = "",
) -> list[Tensor]:
    """gate, up and down; zeros for None.

    Raises:
        Unfit: a weight has another shape, or a bias.

    Arguments:
        names: role -> name in the file.
        width: channels of an expert.
        stack: the number of experts; empty for an MLP.
        prefix: of the roles in the block.
    """
    hidden, found = source.config.hidden_size, []
    for role, name in names.items():
        shape = (*stack, hidden, width) if role == "down" else (*stack, width, hidden)
        if block is None:
            found.append(Tensor(f"{name}.weight", shape))
            continue
        rows = source.rows(block, f"{prefix}{role}", None, factors[role])
        if source.shape(rows) != shape or source.bias(rows) is not None:
            raise Unfit(
                f"{rows.source} has shape {source.shape(rows)} and {'a' if source.bias(rows) else 'no'} bias; "
                f"readers expect {shape} without one"
            )
        found.append(Tensor(f"{name}.weight", shape, (rows,)))
    return found


def router(source: Source, block: Block | None, count: int) -> Tensor:
    """What chooses experts; zeros for None."""
    parts = () if block is None else (source.rows(block, "router"),)
    return Tensor(ROUTER, (count, source.config.hidden_size), parts, plain=True)
