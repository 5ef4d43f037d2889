"""Rotary positions in a GGUF file: keys for most kinds, and tensors of divisors for those of Llama 3 and Phi 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pliant.exporters.gguf.plan import Unfit

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_KEYS = {  # of transformers -> of the file
    "factor": ".rope.scaling.factor",
    "original_max_position_embeddings": ".rope.scaling.original_context_length",
    "extrapolation_factor": ".rope.scaling.yarn_ext_factor",
    "attention_factor": ".rope.scaling.yarn_attn_factor",
    "beta_fast": ".rope.scaling.yarn_beta_fast",
    "beta_slow": ".rope.scaling.yarn_beta_slow",
}


def rope_of(config: Any, width: int, layer_type: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata, and tensors of numbers that the frequency of every pair of dimensions is divided by.

    Arguments:
        width: of a head.
        layer_type: the layers whose positions are meant, if they differ; None for all.

    Raises:
        Unfit: the container's readers do not compute these positions.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    given = dict(parameters if layer_type is None else parameters[layer_type])
    kind = given.get("rope_type", "default")
    rotated = int(width * (given.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0))
    base = float(given.get("rope_theta", 10000.0))
    keys: dict[str, Any] = {".rope.dimension_count": rotated, ".rope.freq_base": base}
    if kind == "default":
        return keys, {}
    if kind == "llama3":
        return keys, {FREQUENCIES: _llama3(given, base, rotated)}
    if kind == "longrope":
        context = given["original_max_position_embeddings"]
        keys[".rope.scaling.type"] = kind
        keys[".rope.scaling.original_context_length"] = int(context)
        keys[".rope.scaling.attn_factor"] = _longrope(given, config.max_position_embeddings / context)
        return keys, {LONG: torch.tensor(given["long_factor"]), SHORT: torch.tensor(given["short_factor"])}
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
    return keys, {}


def _llama3(given: Mapping[str, Any], base: float, rotated: int) -> torch.Tensor:
    """Divisors of the frequencies: 1 for short waves, the factor for long ones, and a blend between."""
    frequencies = base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    waves = 2 * math.pi / frequencies
    context, factor = given["original_max_position_embeddings"], given["factor"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    share = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def _longrope(given: Mapping[str, Any], longer: float) -> float:
    """The number that q and k are multiplied by after their rotation."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = given.get("factor") or longer
    return math.sqrt(1 + math.log(factor) / math.log(given["original_max_position_embeddings"])) if factor > 1 else 1.0


def pairwise(heads: int, width: int, rotated: int) -> torch.Tensor:
    """The order of rows that turns heads of two halves into heads of adjacent pairs, shape ``(heads * width,)``.

    transformers rotates dimension ``i`` of a head with ``i + rotated / 2``; some readers rotate neighbours.
    """
    rows = torch.arange(heads * width).view(heads, width)
    turned = rows[:, :rotated].view(heads, 2, rotated // 2).transpose(1, 2).reshape(heads, rotated)
    return torch.cat((turned, rows[:, rotated:]), 1).reshape(-1)
