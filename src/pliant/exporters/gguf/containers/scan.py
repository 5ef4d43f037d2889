"""The scans of Mamba-2, which several containers have, and the parts that those of Mamba have in common with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pliant.anatomy import Block
from pliant.exporters.gguf.plan import Plan, Rows, Tensor, Unfit
from pliant.exporters.gguf.source import Source

SIZES = ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")


def keys_of(source: Source, plan: Plan) -> dict[str, int]:
    """The sizes of its scans, which are equal in all layers of a file.

    Raises:
        Unfit: no scan is left, its sizes differ, or readers compute it in another way.
    """
    attributes = {"time_step_rank": "num_heads", "group_count": "n_groups"}
    keys = sizes_of(source, attributes)
    for block in source.of_role("scan"):
        _check(source, block, plan)
    return keys


def sizes_of(source: Source, attributes: Mapping[str, str]) -> dict[str, int]:
    """The sizes that the scans of all layers have.

    Arguments:
        attributes: key -> attribute of a mixer, beside those that every scan has.

    Raises:
        Unfit: no scan is left, its sizes differ, or it lost what every scan of readers has.
    """
    blocks = source.of_role("scan")
    if not blocks:
        raise Unfit("no scan is left")
    attributes = {"inner_size": "intermediate_size", "state_size": "ssm_state_size", **attributes}
    found: list[dict[str, int]] = []
    for block in blocks:
        mixer = source.module(block)
        if mixer.ssm_state_size == 0:
            raise Unfit(f"{block.name} is a convolution whose scan was removed, and readers have no such layer")
        if mixer.activation not in ("silu", "swish"):
            raise Unfit(f"{block.name} has the activation {mixer.activation}, and readers compute silu")
        if mixer.in_proj.bias is not None or mixer.out_proj.bias is not None:
            raise Unfit(f"the projections of {block.name} have a bias, and those of readers have none")
        own = {key: int(getattr(mixer, name)) for key, name in attributes.items()}
        found.append({"conv_kernel": mixer.conv1d.weight.shape[-1], **own})
    for key in found[0]:
        if len(sizes := {own[key] for own in found}) > 1:
            raise Unfit(f"its scans differ from layer to layer ({key}: {sorted(sizes)}), and readers have one for all")
    return {f".ssm.{key}": size for key, size in found[0].items()}


def epsilon_of(source: Source) -> float | None:
    """The epsilon of the norms of its scans; None if they have none.

    Raises:
        Unfit: it differs from layer to layer.
    """
    norms = [norm_of(source.module(block)) for block in source.of_role("scan")]
    found = {float(norm.variance_epsilon) for norm in norms if norm is not None}
    if len(found) > 1:
        raise Unfit("the norms of its scans have different epsilons, because the scans are cut differently")
    return found.pop() if found else None


def norm_of(mixer: Any) -> Any:
    """The norm of what a scan returns; None if it has none."""
    norm = getattr(mixer, "norm", None)
    return norm if hasattr(norm, "variance_epsilon") else None


def _check(source: Source, block: Block, plan: Plan) -> None:
    """Refuse what readers do not compute, and note what they may compute differently."""
    mixer = source.module(block)
    least, most = mixer.time_step_limit
    if most != float("inf"):
        raise Unfit(f"the time steps of {block.name} end at {most:g}, and those of readers do not")
    if least > 0:
        _note(plan, f"time steps below {least:g} are raised to that by transformers, and not by readers of the file")
    if (norm := norm_of(mixer)) is None:
        return
    if getattr(norm, "norm_before_gate", False):
        raise Unfit(f"{block.name} is normed before its gate, and readers norm after it")
    width = mixer.intermediate_size
    groups = getattr(norm, "n_groups", None) or width // getattr(norm, "group_size", width)
    if groups != mixer.n_groups:
        raise Unfit(f"the norm of {block.name} has {groups} groups, and in readers it has {mixer.n_groups}")


def _note(plan: Plan, sentence: str) -> None:
    if sentence not in plan.notes:
        plan.notes.append(sentence)


def tensors_of(source: Source, block: Block, factor: float = 1.0, inward: Sequence[float] = (1.0,) * 5) -> list[Tensor]:
    """The tensors of a scan in a layer.

    Arguments:
        factor: what its output is multiplied by.
        inward: what the gate, the input, B, C and the time steps are multiplied by.
    """
    mixer = source.module(block)
    heads, groups, channels = mixer.num_heads, mixer.n_groups, mixer.intermediate_size

    def of(name: str, factor: float = 1.0) -> Rows:
        return Rows(source.path(block, name), factor=factor)

    into, out = of("in_proj"), of("out_proj", factor)
    widths = (channels, channels, *(groups * mixer.ssm_state_size,) * 2, heads)
    stretches = torch.arange(sum(widths)).split(widths)
    parts = tuple(replace(into, order=rows, factor=by) for rows, by in zip(stretches, inward, strict=True))
    found = [
        Tensor("ssm_in.weight", source.shape(into), (into,) if set(inward) == {1.0} else parts),
        *convolution(source, block, "conv1d", "ssm_conv1d"),
        Tensor("ssm_dt.bias", (heads,), (of("dt_bias"),), plain=True),
        Tensor("ssm_a", (heads, 1), (of("A_log"),), change=lambda logs: -logs.exp().unsqueeze(1), plain=True),
        Tensor("ssm_d", (heads, 1), (of("D"),), change=lambda skips: skips.unsqueeze(1), plain=True),
        Tensor("ssm_out.weight", source.shape(out), (out,)),
    ]
    if norm_of(mixer) is not None:
        shape = (groups, channels // groups)
        norm = (of("norm"),)
        found.append(Tensor("ssm_norm.weight", shape, norm, change=lambda values: values.view(shape), plain=True))
    return found


def empty(keys: Mapping[str, int], hidden: int, normed: bool) -> list[Tensor]:
    """The tensors of a scan that adds nothing.

    Arguments:
        keys: its sizes.
        normed: readers norm its output.
    """
    kernel, channels, state, heads, groups = (keys[f".ssm.{name}"] for name in SIZES)
    mixed = channels + 2 * groups * state
    shapes = {
        "ssm_in.weight": (channels + mixed + heads, hidden),
        "ssm_conv1d.weight": (mixed, kernel),
        "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_out.weight": (hidden, channels),
        **({"ssm_norm.weight": (groups, channels // groups)} if normed else {}),
    }
    return [
        Tensor(name, shape, plain=name not in ("ssm_in.weight", "ssm_out.weight")) for name, shape in shapes.items()
    ]


def convolution(source: Source, block: Block, name: str, to: str) -> list[Tensor]:
    """A depthwise convolution, shape ``(channels, kernel)``, and its bias; readers always add one."""
    conv: Any = source.module(block).get_submodule(name)
    channels, _, kernel = conv.weight.shape
    weight = Rows(source.path(block, name))
    bias = source.bias(weight)
    return [
        Tensor(f"{to}.weight", (channels, kernel), (weight,), _squeeze, plain=True),
        Tensor(f"{to}.bias", (channels,), () if bias is None else (bias,), plain=True),
    ]


def _squeeze(values: torch.Tensor) -> torch.Tensor:
    return values.squeeze(1)
