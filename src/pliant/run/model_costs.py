"""The costs of a model, counted from its anatomy, for the report of a run."""

from __future__ import annotations

from typing import Any

from pliant.checkpoint.packed_bytes import held_bytes, packed_bytes, unpacked_bytes
from pliant.compat.native import cached_bytes
from pliant.elastic import Subnet, cache_bytes, described, macs, parameters, state_bytes, streamed_bytes, weight_bytes
from pliant.measure.speed.bench import PROMPT


def model_costs(model: Any) -> dict[str, Any]:
    """Parameters, multiply-accumulates and bytes of a model, and the ``units`` of its axes (1 for a block without
    axes).

    ``streamed_bytes`` are those that decoding one token reads or writes: weights, a cache of as many tokens as the
    prompt of a timing, and states of a fixed size, ``state_bytes``.
    """
    anatomy = described(model)
    whole = {block.name: 1 for block in anatomy.blocks.values() if not block.leaders}
    element = next(model.parameters()).element_size()
    weights = weight_bytes(anatomy, element=element)
    cached = cache_bytes(anatomy, element=element)
    streamed = streamed_bytes(anatomy, element=element, context=PROMPT)
    if packed := packed_bytes(model):
        weights = held_bytes(model)
        cached = cached_bytes(model) or cached
        others = streamed_bytes(anatomy, element=element) - unpacked_bytes(model, element)
        streamed = packed + max(0, others) + PROMPT * cached
    return {
        "parameters": parameters(anatomy),
        "macs_per_token": macs(anatomy, Subnet(), tokens=1, context=PROMPT),
        "weight_bytes": weights,
        "streamed_bytes": streamed,
        "cache_bytes_per_token": cached,
        "state_bytes": state_bytes(anatomy, element=element),
        "units": {axis.name: axis.size for axis in anatomy.axes.values()} | whole,
    }


def shares_kept(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """The share of the units of each axis that is left: 0 if its block was removed."""
    return {name: after.get(name, 0) / size for name, size in before.items()}
