"""Keep transformers' map of tied tensors correct when a cut removes some of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def correct_ties(model: nn.Module) -> None:
    """Drop the names that a cut model no longer has from transformers' map of tied tensors, which loading and saving
    use.

    transformers maps each tied name to the name of the tensor that it shares. If that name is gone, the first of the
    others replaces it.
    """
    parts: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        tied = getattr(part, "all_tied_weights_keys", None) or {}
        present = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        if present.issuperset({*tied, *tied.values()}):
            continue
        groups: dict[str, list[str]] = {}
        for target, source in tied.items():
            groups.setdefault(source, [source]).append(target)
        remaining = [[name for name in names if name in present] for names in groups.values()]
        part.all_tied_weights_keys = {name: names[0] for names in remaining for name in names[1:]}
        part._tied_weights_keys = dict(part.all_tied_weights_keys)  # of this model, not of its class
