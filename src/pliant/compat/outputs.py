"""Keep one entry per layer in ``output_attentions``: None for a removed attention.

transformers collects attention weights by hooks on the attention class; the null module of a removed attention has
another class.
"""

from __future__ import annotations

from types import ModuleType

MODULE = "pliant.anatomy.null"


def register(module: ModuleType) -> None:
    """Make every null module of an attention report that it has no attention weights."""
    if no_weights not in module.Null.on_attention:
        module.Null.on_attention.append(no_weights)


def no_weights() -> None:
    """Add None to the attention weights, if transformers is collecting them."""
    import torch
    from transformers.utils.output_capturing import _active_collector

    if torch.compiler.is_compiling() and not _active_collector.compiling:
        return  # nothing is collected; compiled code cannot read a context variable
    collected = _active_collector.get()
    if collected is not None and "attentions" in collected:
        collected["attentions"].append(None)
