"""Rotary positions in a GGUF file: keys for most kinds, and a tensor of divisors for that of Llama 3."""

from __future__ import annotations

import math
from typing import Any

import torch

from pliant.exporters.gguf.plan import Unfit

FREQUENCIES = "rope_freqs.weight"
_KEYS = {  # of transformers -> of the file
    "factor": ".rope.scaling.factor",
    "original_max_position_embeddings": ".rope.scaling.original_context_length",
    "extrapolation_factor": ".rope.scaling.yarn_ext_factor",
    "attention_factor": ".rope.scaling.yarn_attn_factor",
    "beta_fast": ".rope.scaling.yarn_beta_fast",
    "beta_slow": ".rope.scaling.yarn_beta_slow",
}


def rope_of(config: Any, width: int) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The metadata, and what the angles of every pair of dimensions are divided by; None for nothing.

    Arguments:
        width: of a head; every dimension rotates.

    Raises:
        Unfit: the container's readers do not compute these positions.
    """
    given = dict(getattr(config, "rope_parameters", None) or {})
    kind = given.get("rope_type", "default")
    rotated = given.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    if rotated != 1:
        raise Unfit(f"only {rotated:g} of the dimensions of a head rotate")
    keys: dict[str, Any] = {".rope.dimension_count": width, ".rope.freq_base": float(given.get("rope_theta", 10000.0))}
    if kind == "default":
        return keys, None
    if kind == "llama3":
        return keys, _llama3(given, keys[".rope.freq_base"], width)
    if kind not in ("linear", "yarn"):
        raise Unfit(f"rotary positions of the kind {kind!r} have no keys")
    known = {*_KEYS, "rope_type", "rope_theta", "partial_rotary_factor", "truncate"}
    if other := sorted(key for key in given if key not in known and given[key] is not None):
        raise Unfit(f"rotary positions with {', '.join(other)} have no keys")
    keys[".rope.scaling.type"] = kind
    for key, name in _KEYS.items():
        if given.get(key) is not None:
            whole = key == "original_max_position_embeddings"
            keys[name] = int(given[key]) if whole else float(given[key])
    return keys, None


def _llama3(given: dict[str, Any], base: float, width: int) -> torch.Tensor:
    """Divisors of the frequencies: 1 for short waves, the factor for long ones, and a blend between."""
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    waves = 2 * math.pi / frequencies
    context, factor = given["original_max_position_embeddings"], given["factor"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    share = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def pairwise(heads: int, width: int) -> torch.Tensor:
    """The order of rows that turns heads of two halves into heads of adjacent pairs, shape ``(heads * width,)``.

    transformers rotates dimension ``i`` of a head with ``i + width / 2``; some readers rotate neighbours.
    """
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)
