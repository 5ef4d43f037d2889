"""The scans of Mamba, which the containers mamba and jamba have."""

from __future__ import annotations

from typing import Any

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


def tensors_of(source: Source, block: Block, factor: float = 1.0) -> list[Tensor]:
    """The tensors of a scan in a layer.

    Arguments:
        factor: what its output is multiplied by.
    """
    mixer: Any = source.module(block)

    def of(name: str, factor: float = 1.0) -> Rows:
        return Rows(source.path(block, name), factor=factor)

    steps = of("dt_proj")
    bias = source.bias(steps)
    assert bias is not None
    matrices = {"ssm_in": of("in_proj"), "ssm_x": of("x_proj"), "ssm_dt": steps, "ssm_out": of("out_proj", factor)}
    norms = {to: of(name) for name, to in NORMS.items() if name in block.spec.weights}
    return [
        *(Tensor(f"{name}.weight", source.shape(rows), (rows,)) for name, rows in matrices.items()),
        *(Tensor(f"{name}.weight", source.shape(rows), (rows,), plain=True) for name, rows in norms.items()),
        *scan.convolution(source, block, "conv1d", "ssm_conv1d"),
        Tensor("ssm_dt.bias", source.shape(bias), (bias,), plain=True),
        Tensor("ssm_a", tuple(mixer.A_log.shape), (of("A_log"),), change=lambda logs: -logs.exp(), plain=True),
        Tensor("ssm_d", tuple(mixer.D.shape), (of("D"),), plain=True),
    ]
