"""Shapes of a traced model in config.json: a record of its tensors whose shapes differ from those the config would
build.

::

    "pliant_shapes": {
      "tensors": {"resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": [24, 64, 1, 1], ...},
      "attributes": {"resnet.encoder.stages.0.layers.0.layer.0.convolution.out_channels": 24, ...},
      "removed": {"resnet.encoder.stages.2.layers.4": {"residual": 0, "guard": "layer.0.convolution.weight"}}
    }

A convolutional network has no list of equal layers that ``per_layer_config`` could describe. Without pliant, the
narrower tensors make any loader refuse; if a block was removed, its guard does: a tensor of one element with the name
of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from pliant.anatomy import Null, plain_config
from pliant.errors import ArtefactError

RECORD = "pliant_shapes"
# the plain attributes of torch's modules that hold the sizes of their tensors
SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"),
    *("normalized_shape", "num_channels", "num_groups"),
)


def write_shapes(model: Any) -> None:
    """Record the shapes of a traced model in its config, and give removed blocks their guards."""
    with torch.device("meta"):
        dense = type(model)(plain_config(model.config))
    removed = {path: module for path, module in model.named_modules() if isinstance(module, Null)}
    for path, null in removed.items():
        if null.guard is None:
            weights = dict(dense.get_submodule(path).named_parameters())
            guard = max(weights, key=lambda name: weights[name].numel())
            removed[path] = Null(null.returns_tuple, null.residual, guard)
            model.set_submodule(path, removed[path])
    full = dense.state_dict()
    kept = [path for path, _ in model.named_modules() if not any(f"{path}.".startswith(f"{gone}.") for gone in removed)]
    sizes = [(path, name, getattr(model.get_submodule(path), name, None)) for path in kept for name in SIZES]
    record = {
        "tensors": {
            path: list(tensor.shape)
            for path, tensor in model.state_dict().items()
            if tensor.shape != full[path].shape and not any(path.startswith(f"{gone}.") for gone in removed)
        },
        "attributes": {
            f"{path}.{name}": value
            for path, name, value in sizes
            if value is not None and value != getattr(dense.get_submodule(path), name, None)
        },
        "removed": {
            path: {"returns_tuple": null.returns_tuple, "residual": null.residual, "guard": null.guard}
            for path, null in removed.items()
        },
    }
    vars(model.config).pop(RECORD, None)
    if any(record.values()):
        setattr(model.config, RECORD, record)


@torch.no_grad()
def shape_by(model: Any, record: Mapping[str, Mapping[str, Any]]) -> None:
    """Cut a freshly built model, with or without a head, to the shapes in a record.

    Raises:
        ArtefactError: the model lacks a module that the record removes.
    """
    for path, arguments in record["removed"].items():
        own_path = find_path(model, path, model.get_submodule)
        if own_path is None:
            raise ArtefactError(
                f"{type(model).__name__} has no module {path!r}, which config.json lists as removed; open the folder "
                "with the class that wrote it"
            )
        model.set_submodule(own_path, Null(**arguments))
    for path, size in record["tensors"].items():
        for kind, of_kind in (("_parameters", model.get_parameter), ("_buffers", model.get_buffer)):
            own_path = find_path(model, path, of_kind)
            if own_path is not None:
                full = of_kind(own_path)
                own = full[tuple(slice(0, length) for length in size)].clone()
                holder, _, name = own_path.rpartition(".")
                getattr(model.get_submodule(holder), kind)[name] = (
                    nn.Parameter(own, requires_grad=full.requires_grad) if kind == "_parameters" else own
                )
    for path, value in record["attributes"].items():
        holder, _, name = path.rpartition(".")
        own_path = find_path(model, holder, model.get_submodule)
        if own_path is not None:
            setattr(model.get_submodule(own_path), name, tuple(value) if isinstance(value, list) else value)


def find_path(model: Any, path: str, get: Callable[[str], Any]) -> str | None:
    """The path of a part in a model that may have another head, or none, than the saved one; None if the part is
    missing."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        with suppress(AttributeError):
            get(candidate)
            return candidate
    return None
