"""The scans of Mamba, which the containers mamba and jamba have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan
from pliant.exporters.gguf.plan import Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Source

NORMS = {"dt_layernorm": "ssm_dt_norm", "b_layernorm": "ssm_b_norm", "c_layernorm": "ssm_c_norm"}


def keys_of(source: Source) -> dict[str, int]:
    """The sizes of its scans, which are equal in all layers of a file.

    Raises:
        Unfit: no scan is left, its sizes differ, or readers compute it in another way.
    """
    keys = scan.sizes_of(source, {"time_step_rank": "time_step_rank"})
    if keys[".ssm.inner_size"] != (wide := 2 * source.config.hidden_size):
        raise Unfit(f"its scans have {keys['.ssm.inner_size']} channels, and readers take {wide} alone")
    return keys


def tensors_of(source: Source, block: Block, epsilon: float, factor: float = 1.0) -> list[Tensor]:
    """The tensors of a scan in a layer.

    Some norm the time steps, B and C, which ``x_proj`` returns, with an epsilon of their own. Readers have one for all
    norms, and compute the same from values that are larger or smaller by the root of the ratio.

    Arguments:
        epsilon: of all norms in the file.
        factor: what the output is multiplied by.
    """
    mixer: Any = source.module(block)

    def of(name: str, factor: float = 1.0) -> Rows:
        return Rows(source.path(block, name), factor=factor)

    steps, into, chosen, out = of("dt_proj"), of("in_proj"), of("x_proj"), of("out_proj", factor)
    bias = source.bias(steps)
    assert bias is not None
    stretches = torch.arange(source.shape(chosen)[0]).split(
        (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
    )
    inner = [
        math.sqrt(epsilon / own) if (own := epsilon_of(getattr(mixer, name, None))) is not None else 1.0
        for name in NORMS
    ]
    parts = tuple(replace(chosen, order=rows, factor=by) for rows, by in zip(stretches, inner, strict=True))
    norms = {to: of(name) for name, to in NORMS.items() if name in block.spec.weights}
    return [
        Tensor("ssm_in.weight", source.shape(into), (into,)),
        Tensor("ssm_x.weight", source.shape(chosen), (chosen,) if set(inner) == {1.0} else parts),
        Tensor("ssm_dt.weight", source.shape(steps), (steps,)),
        Tensor("ssm_dt.bias", source.shape(bias), (bias,), plain=True),
        *scan.convolution(source, block, "conv1d", "ssm_conv1d"),
        *(Tensor(f"{name}.weight", source.shape(rows), (rows,), plain=True) for name, rows in norms.items()),
        Tensor("ssm_a", tuple(mixer.A_log.shape), (of("A_log"),), change=lambda logs: -logs.exp(), plain=True),
        Tensor("ssm_d", tuple(mixer.D.shape), (of("D"),), plain=True),
        Tensor("ssm_out.weight", source.shape(out), (out,)),
    ]


def epsilon_of(norm: Any) -> float | None:
    """The epsilon of a norm, which may be missing."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
