"""Scaled rotary positions of a GGUF file, which transformers does not read: without them a model computes something
else than in llama.cpp."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pliant.checkpoint.gguf_header import Header

_DIVISORS = "rope_freqs.weight"
_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {  # of the file -> of transformers
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_FLOAT32 = 0  # element type


def scaled_config(path: Path, header: Header) -> Any:
    """The config of a GGUF file with its scaling of rotary positions; None if transformers reads the file as it is.

    Warns:
        UserWarning: the file scales rotary positions in a way that is not known here; they stay unscaled.
    """
    architecture = header.metadata["general.architecture"]
    start = f"{architecture}.rope.scaling."
    scaling = {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}
    if old := header.metadata.get(f"{architecture}.rope.scale_linear"):
        scaling = {"type": "linear", "factor": old} | scaling
    kind = scaling.get("type", "none")
    divides = _DIVISORS in header.tensors
    if architecture == "gpt-oss" or (not divides and not set(_FACTORS) & set(header.tensors) and kind == "none"):
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    scaled = _scaled(path, header, config, parameters, kind, scaling)
    if scaled is None:
        warnings.warn(
            f"{str(path)!r} scales rotary positions ({kind}) in a way that is not supported; the model is loaded "
            "without, and differs from the file in llama.cpp, most of all in long texts",
            UserWarning,
            stacklevel=4,
        )
        return None
    if scaled == parameters:
        return None
    config.get_text_config().rope_parameters = scaled
    return config


def _scaled(
    path: Path, header: Header, config: Any, parameters: dict[str, Any], kind: str, scaling: dict[str, Any]
) -> dict[str, Any] | None:
    nested = "full_attention" in parameters  # Gemma: windows are not scaled
    inner = parameters["full_attention"] if nested else parameters
    if "rope_theta" not in inner or set(_FACTORS) & set(header.tensors):
        return None
    if kind == "linear" and _DIVISORS not in header.tensors:
        new = inner | {"rope_type": "linear", "factor": float(scaling.get("factor", 0) or 1)}
    elif kind == "yarn" and set(scaling) - {"type", "finetuned"} <= set(_YARN) and not nested:
        new = inner | {"rope_type": "yarn"} | {_YARN[key]: scaling[key] for key in _YARN if key in scaling}
        if "factor" not in new:
            return None
    elif kind == "none" and not nested:
        return _llama3(_values(path, header), config, inner)
    else:
        return None
    return parameters | {"full_attention": new} if nested else new


def _llama3(divisors: torch.Tensor | None, config: Any, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters of Llama 3 that divide the frequencies as the file does; the given ones if it divides by one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if divisors is None:
        return None
    if bool((divisors == 1).all()):
        return parameters
    new = parameters | {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    text = config.get_text_config()
    before = text.rope_parameters
    try:
        text.rope_parameters = new
        found = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))[0]
    finally:
        text.rope_parameters = before
    width = 2 * len(found)
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    same = len(divisors) == len(found) and torch.allclose(plain / found, divisors, rtol=1e-3)
    return new if same else None


def _values(path: Path, header: Header) -> torch.Tensor | None:
    kind, shape, offset = header.tensors[_DIVISORS]
    if kind != _FLOAT32 or len(shape) != 1:
        return None
    return torch.from_numpy(np.fromfile(path, np.float32, shape[0], offset=offset))
