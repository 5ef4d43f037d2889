"""Make a packed model run natively, after a check that native and transformers' code compute the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from pliant.compat.native import CACHE, Native, native_class, plan_of
from pliant.compat.native_generate import generate
from pliant.compat.native_plan import NativePlan, UnlikeError, read_plan, watch_of
from pliant.errors import ArchitectureError, PackedError
from pliant.runtime.library import library

NUDGE = 1e-6  # relative input perturbation of the size of rounding, to measure how much 8-bit activations amplify it
AGREEMENT = 1e-3  # allowed relative difference of hidden states, besides the amplified rounding
TRIED = 16  # tokens on which native and transformers' code are compared


def run_natively(model: nn.Module) -> str:
    """Make the base of a packed model run natively if it can. Native and transformers' code are compared on a few
    tokens at the beginning and at the end of the context, and by generating a few tokens.

    Returns:
        The reason why it cannot, or an empty string.
    """
    base: Any = getattr(model, "base_model", model)
    if library() is None:
        return "the kernels are not available"
    if not hasattr(base, "config"):
        return "it is not a transformers model"
    if isinstance(base, Native):
        return "" if plan_of(base) is not None else "its layers are no longer those that were packed"
    own, was_training = type(base), base.training
    if not set(CACHE) & set(inspect.signature(own.forward).parameters):
        return "its forward names no argument for a cache"
    base.eval()
    agreed = False
    try:
        watch = watch_of(base)
        plan = read_plan(base, watch)
        expected = [_try(base, start) for start in _starts(base)]
        nudged = [_try(base, start, 1 + NUDGE) for start in _starts(base)]
        base.__class__ = native_class(own)
        base._pliant_native = plan, watch
        for start, a, b in zip(_starts(base), expected, nudged, strict=True):
            output = _ran(plan, 1, lambda start=start: _try(base, start))
            _compare(output, a, b, f"at position {start}")
        _generates(model, plan)
        agreed = True
    except (UnlikeError, ArchitectureError, PackedError) as reason:
        return str(reason)
    finally:
        base.train(was_training)
        if not agreed:
            base.__class__ = own
            vars(base).pop("_pliant_native", None)
    if model is not base and hasattr(model, "generate"):
        vars(model)["generate"] = functools.partial(generate, model)
    return ""


def how_it_runs(model: nn.Module) -> dict[str, Any]:
    """Make a packed model run natively if it can; return ``native`` (whether it does) and ``why_not_native`` (the
    reason)."""
    why_not = run_natively(model)
    return {"native": not why_not, "why_not_native": why_not}


def _starts(base: Any) -> list[int]:
    """The positions to compare at: the first, and the last of the model's context."""
    return sorted({0, max(0, getattr(base.config, "max_position_embeddings", 0) - TRIED)})


@torch.inference_mode()
def _try(base: Any, start: int, factor: float = 1.0) -> torch.Tensor:
    """Hidden states of ``TRIED`` tokens from position ``start``, computed in float32; ``factor`` scales the
    embeddings."""
    embedding = base.get_input_embeddings()
    ids = torch.arange(1, TRIED + 1).view(1, -1) * 97 % embedding.weight.shape[0]
    positions = torch.arange(start, start + TRIED)[None]
    embeds = embedding(ids).float() * factor
    return base(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


def _ran(plan: NativePlan, passes: int, compute: Callable[[], Any]) -> Any:
    """The result of ``compute``, which must make ``passes`` native passes.

    Raises:
        UnlikeError: it did not.
    """
    before = plan.decoder.runs
    result = compute()
    if plan.decoder.runs != before + passes:
        raise UnlikeError("transformers calls it with arguments that native runs do not support")
    return result


def _compare(found: torch.Tensor, expected: torch.Tensor, nudged: torch.Tensor, where: str) -> None:
    off = _apart(found, expected)
    if not off <= AGREEMENT + 3 * _apart(nudged, expected):
        raise UnlikeError(f"the native result differs by {off:.1%} {where}")


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of hidden states at the median token."""
    # the state of a padding token may be zero
    length = b.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((a.float() - b.float()).norm(dim=-1) / length).median())


@torch.inference_mode()
def _generates(model: Any, plan: NativePlan, tokens: int = 4) -> None:
    """Generate with a cache and compare the logits with those of a pass without a cache.

    Raises:
        UnlikeError: they differ, or it did not run natively.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return
    ids = torch.arange(TRIED).view(1, -1) * 89 % model.get_input_embeddings().weight.shape[0]
    settings = model.generation_config
    model.generation_config = GenerationConfig()  # the model's own may change the logits
    try:
        generated = _ran(
            plan,
            tokens,
            lambda: model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
    finally:
        model.generation_config = settings
    whole = model(generated.sequences[:, :-1], use_cache=False).logits[:, -tokens:]
    off = _apart(torch.stack(generated.logits, 1), whole)
    if not off <= AGREEMENT:
        raise UnlikeError(f"logits with and without a cache differ by {off:.1%}")
