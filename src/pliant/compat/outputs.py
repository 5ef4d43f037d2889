"""``output_attentions`` keeps one entry a layer where attention was removed: None, as models give it that compute none.

transformers collects the weights of each attention by hooks on the class of it; what stands for a removed one is of another.
"""

from __future__ import annotations

from types import ModuleType

MODULE = "pliant.anatomy.null"


def register(module: ModuleType) -> None:
    """Have every null that stands for an attention say that it gives no weights."""
    if no_weights not in module.Null.on_attention:
        module.Null.on_attention.append(no_weights)


def no_weights() -> None:
    """Add None to the attention weights that transformers is collecting, if it is."""
    import torch
    from transformers.utils.output_capturing import _active_collector

    if torch.compiler.is_compiling() and not _active_collector.compiling:
        return  # nothing is collected; a context variable cannot be asked in compiled code
    collected = _active_collector.get()
    if collected is not None and "attentions" in collected:
        collected["attentions"].append(None)
