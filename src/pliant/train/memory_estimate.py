"""What a training needs of memory, told before it begins."""

from __future__ import annotations

from typing import Any

from torch import nn

from pliant.train.loss import tokens_at_once


def estimate(
    model: Any,
    linears: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    tokens: int,
    *,
    copies: int,
    teacher: Any,
    recompute: bool,
) -> dict[str, int]:
    """Bytes by what they are for.

    Activations are a rule of thumb: what a linear layer reads and gives, and as much again for norms, activation functions
    and dropout.

    Arguments:
        linears: the linear layers of the blocks, by full path.
        parameters: what is trained.
        tokens: in one forward pass.
        copies: of the trained parameters that are kept: their best state, and perhaps how they were given.
        recompute: gradient checkpointing.
    """
    weights = sum(p.numel() * p.element_size() for one in (model, teacher) if one for p in one.parameters())
    trained = sum(p.numel() * 4 for p in parameters.values())
    kept = sum(sum(linear.weight.shape) for linear in linears.values())
    if recompute:  # what goes in is kept of every layer, and one layer at a time is whole
        config = model.config.get_text_config(decoder=True)
        kept = kept // config.num_hidden_layers + config.num_hidden_layers * config.hidden_size
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return {
        "weights": weights,
        "gradients and Adam moments": 3 * trained,
        "copies": copies * trained,
        "activations": 2 * tokens * kept * next(model.parameters()).element_size(),
        # logits, their logarithms and two gradients, and half of that again of the teacher
        "logits": (6 if teacher else 4) * 4 * min(tokens, tokens_at_once(model.device)) * vocabulary,
    }
