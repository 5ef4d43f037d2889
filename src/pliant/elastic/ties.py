"""Keep transformers' map of tied tensors correct when a cut removes some of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pliant.errors import ArtefactError


def correct_ties(model: nn.Module) -> None:
    """Drop the names that a cut model no longer has from transformers' map of tied tensors, which loading and saving
    use.

    transformers maps each tied name to the name of the tensor that it shares. If that name is gone, the first of the
    others replaces it.

    Raises:
        ArtefactError: tensors that are tied have different shapes.
    """
    parts: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        tied = getattr(part, "all_tied_weights_keys", None) or {}
        shapes = {name: tuple(tensor.shape) for name, tensor in part.named_parameters(remove_duplicate=False)}
        groups: dict[str, list[str]] = {}
        for target, source in tied.items():
            groups.setdefault(source, [source]).append(target)
        remaining = [[name for name in names if name in shapes] for names in groups.values()]
        for first, *others in (names for names in remaining if names):
            for other in others:
                if shapes[other] != shapes[first]:
                    raise ArtefactError(
                        f"{first!r} and {other!r} are one shared tensor, but config.json describes the shapes "
                        f"{shapes[first]} and {shapes[other]}; layers that share their tensors must have the same "
                        "sizes in per_layer_config"
                    )
        if shapes.keys() >= {*tied, *tied.values()}:
            continue
        part.all_tied_weights_keys = {name: names[0] for names in remaining for name in names[1:]}
        part._tied_weights_keys = dict(part.all_tied_weights_keys)  # of this model, not of its class
