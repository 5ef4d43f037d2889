"""The blocks of a model and what can be cut from them, as plain data."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pliant.anatomy import Anatomy, Block, Null
from pliant.checkpoint.load import loaded
from pliant.checkpoint.packed_bytes import held_bytes, packed_formats
from pliant.compat.native import cached_bytes
from pliant.compat.native_check import how_it_runs
from pliant.elastic import Subnet, cache_bytes, check, described, macs, parameters, state_bytes, weight_bytes
from pliant.measure.prefix_scorer import store_bytes


def inspect(model: Any, *, self_check: bool = True, dtype: Any = None, device: Any = None) -> dict[str, Any]:
    """Describe a model.

    Arguments:
        model: a transformers model, or what :func:`pliant.load` takes.
        self_check: also verify the description on a few tokens; see :func:`pliant.check`.
        dtype, device: of a model that is given by name or folder, as in :func:`pliant.load`.

    Returns:
        Plain data: family, depth, parameters, MACs per token, bytes, and for each block its axes and its share of the
        parameters; for a traced model MACs per image, and no figures per token.
    """
    model = loaded(model, dtype=dtype, device=device)
    anatomy = described(model)
    packed = packed_formats(model)
    self_check = self_check and not packed  # it needs views of weights, which packed layers cannot give
    if self_check:
        check(model, anatomy)
    element = next(model.parameters()).element_size()
    whole = parameters(anatomy)
    removed = sorted(anatomy.removed())
    if anatomy.traced:
        removed = [path for path, module in model.named_modules() if isinstance(module, Null)]
        costs: dict[str, int] = {"macs_per_image": macs(anatomy)}
    else:
        costs = {
            "macs_per_token": macs(anatomy, Subnet(), tokens=1, context=0),
            "cache_bytes_per_token": cached_bytes(model) or cache_bytes(anatomy, element=element),
            "state_bytes": state_bytes(anatomy, element=element),
        }
        if isinstance(getattr(model, "config", None), PreTrainedConfig):  # a plain module is not searched on text
            costs["search_bytes_per_1000_tokens"] = store_bytes(model, anatomy, 1000)
    return {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "architecture": anatomy.source.name,
        "self_check": "passed" if self_check else "not run",
        "depth": anatomy.depth,
        "parameters": whole,
        "outside_blocks": anatomy.rest,
        **costs,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "packed": packed,
        **(how_it_runs(model) if packed else {}),
        "weight_bytes": held_bytes(model) if packed else weight_bytes(anatomy, element=element),
        "blocks": [_block(block, anatomy, whole) for block in anatomy.blocks.values()],
        "removed": removed,
        "limits": _limits(anatomy),
    }


def _limits(anatomy: Anatomy) -> list[str]:
    """The removals that the layout forbids or links, as clauses."""
    limits = []
    for (_, layer_type), holders in anatomy.holders().items():
        where = f" in the {layer_type} layers" if len(set(anatomy.layer_types)) > 1 else ""
        limits.append(f"the last {holders[0].kind}{where} stays, because the model counts tokens in it")
    bound = {block.kind for block in anatomy.blocks.values() if block.role == "scan" and not block.spec.skip}
    limits += [f"the scan of {kind} cannot be removed alone, because no skip would remain" for kind in sorted(bound)]
    inner = {block.kind: block.spec.inside for block in anatomy.blocks.values() if block.spec.inside}
    limits += [f"without {outer}, {kind} of the same layer goes, too" for kind, outer in inner.items()]
    shared: dict[str, list[int]] = {}
    for block in anatomy.blocks.values():
        if block.tied is not None:
            shared.setdefault(block.tied, []).append(block.layer)
    for first, layers in shared.items():
        listed = ", ".join(map(str, layers))
        limits.append(f"{anatomy.blocks[first].kind} of layers {listed} is shared: it is cut alike there")
    return limits


def _block(block: Block, anatomy: Anatomy, whole: int) -> dict[str, Any]:
    """A block and its axes. The parameters of a unit are counted in all blocks that share its axis."""
    axes = {}
    for axis in block.leaders:
        narrower = Subnet().keeping(axis.name, axis.size - axis.groups) if axis.size > axis.groups else None
        each = None if narrower is None else (whole - parameters(anatomy, narrower)) // axis.groups
        axes[axis.leader] = {"units": axis.size, "width": axis.unit, "parameters_per_unit": each}
        if axis.groups > 1:  # every group keeps equally many units
            axes[axis.leader] |= {"groups": axis.groups}
    own = block.parameters({})
    return {
        "block": block.name,
        "parameters": own,
        "share": own / whole,
        "removable": block.removable,
        "axes": axes,
    }
