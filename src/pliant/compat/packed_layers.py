"""Record packed layers in config.json, under transformers' own key ``quantization_config``, and rebuild them.

::

    "quantization_config": {
      "quant_method": "pliant", "version": 1,
      "modules": {"model.layers.0.self_attn.q_proj": {"format": "int4", "sparse": false, "bytes": 188544}, ...},
      "cache": {"format": "int8"}
    }

The bytes of a packed layer are stored under the name of its weight. Without pliant, transformers reports that it does
not know this method, and then refuses the folder because that tensor has another shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pliant.checkpoint.shape_record import find_path
from pliant.compat.packed_quantizer import VERSION, PackedConfig
from pliant.errors import ArtefactError, PackedError
from pliant.runtime.dense import is_linear, sizes_of
from pliant.runtime.packed_linear import Packed


def record_packed(model: Any, cache: Mapping[str, Any]) -> None:
    """Record in a model's config which of its layers are packed, and how its caches keep tokens.

    In a module that is not a transformers model, this is done for the transformers models inside it.
    """
    if not isinstance(model, PreTrainedModel):
        for child in model.children():
            record_packed(child, cache)
        return
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Packed):
            header = module.header()
            modules[name] = {"format": header.format, "sparse": header.sparse, "bytes": header.size}
            if module.tied:
                modules[name]["tied"] = True
    if not modules:
        return
    packed_config: Any = PackedConfig
    config: Any = model.config
    config.quantization_config = packed_config(modules=modules, cache=dict(cache))
    if _untie(model, modules) and not getattr(model, "all_tied_weights_keys", None):
        config.tie_word_embeddings = False


def make_room(model: Any, packing: Any) -> None:
    """Replace linear layers by empty packed layers, before weights are loaded.

    Arguments:
        packing: the :class:`PackedConfig` of the model's config. If it came from the config of the text model inside,
            its names are extended to those of the whole model, and it is removed from the text config. Layers of a head
            that the model lacks are removed from it, and names get the prefix that they have in this model.

    Raises:
        ArtefactError: the version is unknown, no listed layer is in the model, or one is not linear.
    """
    if packing.version != VERSION:
        raise ArtefactError(
            f"the packed layers have version {packing.version}, this pliant reads version {VERSION}; use the pliant "
            "that wrote them"
        )
    _complete(model, packing)
    packing.modules = _named_here(model, packing.modules)
    placed: dict[int, Packed] = {}
    for name, entry in packing.modules.items():
        layer: Any = model.get_submodule(name)
        if isinstance(layer, Packed):
            continue  # the same layer under another name, already replaced
        if id(layer) not in placed:
            if not is_linear(layer):
                raise ArtefactError(
                    f"config.json lists {name!r} as packed, but it is {type(layer).__name__}, not a linear layer"
                )
            rows, columns = sizes_of(layer)
            weight = torch.empty(entry["bytes"], dtype=torch.uint8, device="meta")
            bias = None if layer.bias is None else torch.empty(rows, device="meta")
            placed[id(layer)] = Packed(columns, rows, weight, bias, layer.weight.dtype)
            placed[id(layer)].tied = entry.get("tied", False)
        model.set_submodule(name, placed[id(layer)])
    _untie(model, packing.modules)


def _named_here(model: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the layers that this model has, under its names: the folder may hold a model with another head, or
    none."""
    places = {name: find_path(model, name, model.get_submodule) for name in modules}
    here = {place: modules[name] for name, place in places.items() if place is not None}
    # a model's base is a stack of numbered layers
    stacked = [name for name in modules if any(part.isdigit() for part in name.split("."))]
    if stacked and not here:
        raise ArtefactError(
            f"{type(model).__name__} has none of the packed layers that config.json lists, such as {stacked[0]!r}; "
            "open the folder with the class that wrote it"
        )
    return here


def _complete(model: Any, packing: Any) -> None:
    """Extend the names of a text model that was packed by itself: transformers applies its entry to the whole model."""
    text: Any = model.config.get_text_config(decoder=True)
    if text is model.config or "quantization_config" not in vars(text):
        return
    inner = next((name for name, part in model.named_modules() if getattr(part, "config", None) is text), "")
    if inner:
        packing.modules = {f"{inner}.{name}": entry for name, entry in packing.modules.items()}
    del text.quantization_config


def _untie(model: Any, modules: Collection[str]) -> bool:
    """Remove packed weights from transformers' tied weights; return whether any was tied (to an embedding, which
    stays)."""
    packed = {*modules}

    def stays(key: str, source: str) -> bool:
        return not packed & {key.rpartition(".")[0], source.rpartition(".")[0]}

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    remaining = {key: source for key, source in tied.items() if stays(key, source)}
    if len(remaining) == len(tied):
        return False
    model.all_tied_weights_keys = remaining
    for name, part in model.named_modules():
        own = getattr(part, "_tied_weights_keys", None)
        if isinstance(own, dict):
            prefix = f"{name}." if name else ""
            kept = {key: source for key, source in own.items() if stays(prefix + key, prefix + source)}
            if len(kept) < len(own):
                part._tied_weights_keys = kept or None
    return True


def settle(model: nn.Module) -> None:
    """Check all packed layers of a loaded model and move them to the memory that is read fastest.

    Raises:
        ArtefactError: a layer is damaged, or packed bytes were loaded into a layer that is not packed.
    """
    for name, module in model.named_modules():
        if is_linear(module) and module.weight.dtype == torch.uint8:
            raise ArtefactError(
                f"{name}: packed bytes were loaded into a layer that config.json does not list as packed; open the "
                "folder with the class that wrote it"
            )
        if isinstance(module, Packed):
            try:
                module.settle()
            except PackedError as error:
                raise ArtefactError(f"{name}: {error}") from None
