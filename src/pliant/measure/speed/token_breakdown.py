"""Split the time of a decoded token into matrix products, attention and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pliant.anatomy import layers_of
from pliant.compat.cache_argument import cache_argument
from pliant.compat.native import Native, plan_of
from pliant.elastic import described
from pliant.errors import ArchitectureError
from pliant.forward.windows import check_model, check_room
from pliant.measure.speed.bench import new_cache
from pliant.runtime.dense import is_linear
from pliant.runtime.packed_linear import Packed


@torch.inference_mode()
def token_time(model: Any, *, prompt: int = 64, tokens: int = 32, seed: int = 0) -> dict[str, float]:
    """Decode random tokens one at a time after a prompt, and time the parts.

    Attention is the time of its modules without their matrix products: positions, cache, softmax. If the layers run
    natively it is only softmax attention and cache.

    Returns:
        ``linears``, ``attention``, ``rest`` and ``total``, in milliseconds per token.

    Raises:
        DataError: more tokens than the model has positions for.
    """
    check_model(model)
    check_room(model, prompt, tokens)
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(size, (1, prompt + tokens), generator=torch.Generator().manual_seed(seed)).to(model.device)
    cache = cache_argument(model, new_cache(model))
    model(input_ids=ids[:, :prompt], **cache, use_cache=True, logits_to_keep=1)
    base = model.base_model
    plan = plan_of(base) if isinstance(base, Native) else None
    decoder = None if plan is None else plan.decoder
    if decoder is not None:
        decoder.spent[0] = decoder.spent[1] = 0
    called = [model] if decoder is None else [m for m in model.children() if m is not base]
    with _timed(called, attention_modules(model)) as spent:
        began = time.perf_counter()
        for at in range(prompt, prompt + tokens):
            model(input_ids=ids[:, at : at + 1], **cache, use_cache=True)
        total = time.perf_counter() - began
    linears, attention = spent["linears"], max(0.0, spent["attention"] - spent["within"])
    if decoder is not None:
        linears += decoder.spent[0] / 1e9
        attention += decoder.spent[1] / 1e9
    parts = {"linears": linears, "attention": attention, "rest": total - linears - attention, "total": total}
    return {name: 1e3 * seconds / tokens for name, seconds in parts.items()}


def attention_modules(model: Any) -> set[nn.Module]:
    """The modules of a model's attention blocks; none if its layout is unknown."""
    try:
        anatomy = described(model)
    except ArchitectureError:
        return set()
    layers = layers_of(model, anatomy.source)
    return {layers[b.layer].get_submodule(b.spec.module) for b in anatomy.blocks.values() if b.role == "attention"}


@contextmanager
def _timed(roots: list[nn.Module], attention: set[nn.Module]) -> Iterator[dict[str, float]]:
    """Seconds spent in linear layers, in attention modules, and in linear layers within these. A native run falls back
    to calling modules one by one if it finds a hook, so ``roots`` must not contain the modules that it runs."""
    spent = {"linears": 0.0, "attention": 0.0, "within": 0.0}
    inside: list[nn.Module] = []
    begun: dict[nn.Module, float] = {}

    def before(module: nn.Module, _: Any) -> None:
        begun[module] = time.perf_counter()
        if not _is_linear(module):
            inside.append(module)

    def after(module: nn.Module, *_: Any) -> None:
        took = time.perf_counter() - begun[module]
        if not _is_linear(module):
            inside.pop()
            spent["attention"] += took
            return
        spent["linears"] += took
        spent["within"] += took if inside else 0.0

    modules = [m for root in roots for m in root.modules() if _is_linear(m) or m in attention]
    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, Packed)
