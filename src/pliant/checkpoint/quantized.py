"""Packed layers in config.json: ``quantization_config``, in transformers' own place for it.

::

    "quantization_config": {
      "quant_method": "pliant", "version": 1,
      "modules": {"model.layers.0.self_attn.q_proj": {"format": "int4", "sparse": false, "bytes": 188544}, ...},
      "cache": {"format": "int8"}
    }

The bytes of a packed layer are stored as the tensor that its weight would be. Without pliant, transformers says that it
does not know this method, and then refuses the folder because that tensor has another shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pliant.checkpoint.quantizer import VERSION, PackedConfig
from pliant.errors import ArtefactError, PackedError
from pliant.runtime.decoder import run_natively
from pliant.runtime.linear import Packed


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of a model is packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def packed_formats(model: nn.Module) -> dict[str, int]:
    """How many layers are packed in every format."""
    return dict(Counter(module.header().format for module in model.modules() if isinstance(module, Packed)))


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed layers: what a token reads of them."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, Packed))


def how_it_runs(model: nn.Module) -> dict[str, Any]:
    """Of a packed model: ``native``, whether all its layers run in one call, and ``why_not_native``."""
    why_not = run_natively(model)
    return {"native": not why_not, "why_not_native": why_not}


def held_bytes(model: nn.Module) -> int:
    """Bytes of everything that a model with packed layers holds, and its folder stores."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def record_packed(model: Any, cache: Mapping[str, Any]) -> None:
    """Make a model's config say which of its layers are packed, and how its caches keep tokens."""
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            found = module.header()
            modules[name] = {"format": found.format, "sparse": found.sparse, "bytes": found.size}
            if module.tied:
                modules[name]["tied"] = True
    if not modules:
        return
    kept: Any = PackedConfig
    model.config.quantization_config = kept(modules=modules, cache=dict(cache))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, Packed):  # its weight is no longer that of the embedding
        model.config.tie_word_embeddings = False
        if getattr(model, "_tied_weights_keys", None):
            model._tied_weights_keys = None
            model.all_tied_weights_keys = {}


def make_room(model: nn.Module, modules: Mapping[str, Mapping[str, Any]], version: int) -> None:
    """Put empty packed layers where the linear ones are, before weights are loaded.

    Raises:
        ArtefactError: another version, or a layer that is no linear one.
    """
    if version != VERSION:
        raise ArtefactError(f"packed layers of version {version}; this pliant knows version {VERSION}")
    for name, entry in modules.items():
        try:
            layer: Any = model.get_submodule(name)
        except AttributeError:
            continue  # that of a head which this class does without
        if isinstance(layer, nn.Linear):
            columns, rows = layer.in_features, layer.out_features
        elif type(layer).__name__ == "Conv1D":
            columns, rows = layer.nx, layer.nf
        else:
            raise ArtefactError(f"{name!r} is said to be packed, but is {type(layer).__name__}, no linear layer")
        weight = torch.empty(entry["bytes"], dtype=torch.uint8, device="meta")
        bias = None if layer.bias is None else torch.empty(rows, device="meta")
        packed = Packed(columns, rows, weight, bias)
        packed.tied = entry.get("tied", False)
        model.set_submodule(name, packed)


def settle(model: nn.Module) -> None:
    """Look at all packed layers of a loaded model and move them to where they are read fastest.

    Raises:
        ArtefactError: one is damaged.
    """
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            try:
                module.settle()
            except PackedError as error:
                raise ArtefactError(f"{name}: {error}") from None
    run_natively(model)
