"""Estimate the memory that a training needs."""

from __future__ import annotations

from typing import Any

from torch import nn

from pliant.train.loss import logits_at_once


def memory_needed(
    model: Any,
    linears: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    tokens: int,
    *,
    copies: int,
    teacher: Any,
    recompute: bool,
) -> dict[str, int]:
    """The bytes that a training needs, by purpose.

    Activations are a rule of thumb: the inputs and outputs of linear layers, and as much again for norms, activation
    functions and dropout.

    Arguments:
        linears: the linear layers of the blocks, by full path.
        parameters: the trained parameters.
        tokens: tokens in one forward pass.
        copies: copies of the trained parameters that are kept: their best state, and their original values if all are
            trained.
        recompute: gradient checkpointing.
    """
    weights = sum(p.numel() * p.element_size() for one in (model, teacher) if one for p in one.parameters())
    trained = sum(p.numel() * 4 for p in parameters.values())
    kept = sum(sum(linear.weight.shape) for linear in linears.values())
    if recompute:  # the input of every layer is kept, and all activations of one layer at a time
        config = model.config.get_text_config(decoder=True)
        kept = kept // config.num_hidden_layers + config.num_hidden_layers * config.hidden_size
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return {
        "weights": weights,
        "gradients and Adam moments": 3 * trained,
        "copies": copies * trained,
        "activations": 2 * tokens * kept * next(model.parameters()).element_size(),
        # logits, their logarithms and two gradients; half of that again for the teacher
        "logits": (6 if teacher else 4) * 4 * min(tokens, logits_at_once(model.device)) * vocabulary,
    }
