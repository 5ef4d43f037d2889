"""Run the layers of a transformers model in one native call, if that computes the same.

The base of a packed model gets a subclass of its own class. Its ``forward`` passes all layers to
:mod:`pliant.runtime.decoder` if every argument is known, no module is hooked or replaced, and the model is in
evaluation mode without gradients. Otherwise the class of transformers computes layer by layer, with the same packed
weights.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import _active_collector

from pliant.compat.block_cache import BlockLayer, may_be_blocks
from pliant.compat.native_plan import NativePlan, UnlikeError, read_plan, watch_of
from pliant.compat.watch import Watch, runs_own_code
from pliant.errors import ArchitectureError, PackedError
from pliant.runtime.kv_blocks import Blocks, Keeping, per_token
from pliant.runtime.threads import torch_on_all
from pliant.torch_private import observed

CACHE = ("cache", "past_key_values")  # names of one argument: since 5.24 of transformers, and before
KNOWN = {  # arguments of forward that a native run handles
    *("input_ids", "attention_mask", "position_ids", *CACHE, "inputs_embeds", "use_cache"),
    *("cache_position", "return_dict", "output_attentions", "output_hidden_states"),
}
TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")  # those of them that are

checked = threading.local()
"""``known``: plan and watch of a base that does not change until ``generate`` returns in this thread."""


class Native:
    """Mixin placed before a base model's own class.

    Attributes:
        arguments: names of the arguments of forward, in order.
        cache_word: this transformers' name for the cache, as an argument and in an output.
    """

    arguments: ClassVar[tuple[str, ...]] = ()
    cache_word: ClassVar[str] = ""

    def __reduce__(self: Any) -> Any:
        """Pickle without the native decoder; a copy or unpickled model makes its own."""
        state = {name: value for name, value in vars(self).items() if name != "_pliant_native"}
        return _empty, (type(self).__mro__[2],), state

    def __reduce_ex__(self, _: Any) -> Any:
        return self.__reduce__()


@functools.cache
def native_class(own: type) -> type:
    """A subclass of a base model's class whose forward pass is one native call if possible."""
    stock: Any = own.forward  # pyright: ignore[reportAttributeAccessIssue]
    arguments = tuple(inspect.signature(stock).parameters)[1:]
    word = next(word for word in CACHE if word in arguments)

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = renamed(kwargs, word)
        if torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        given = _known(self, args, kwargs)
        if given is not None and (output := _run(self, given)) is not None:
            return output
        with torch_on_all():
            return stock(self, *args, **kwargs)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "forward": forward}
    return type(own.__name__, (Native, own), {**names, "arguments": arguments, "cache_word": word})


def _empty(own: type) -> Any:
    return object.__new__(native_class(own))


def _known(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The given arguments of a call, by name; None if an argument or the surrounding state rules out a native run."""
    if len(args) > len(base.arguments):
        return None
    given = {**dict(zip(base.arguments, args, strict=False)), **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    if not given.keys() <= KNOWN:
        return None
    asked = [given.pop(n, getattr(base.config, n, False)) for n in ("output_attentions", "output_hidden_states")]
    if any(asked) or given.pop("return_dict", getattr(base.config, "return_dict", True)) is not True:
        return None
    tensors = {name: given[name] for name in TENSORS if name in given}
    if any(type(tensor) is not torch.Tensor or tensor.device.type != "cpu" for tensor in tensors.values()):
        return None
    if ("input_ids" in given) == ("inputs_embeds" in given):
        return None
    if base.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _observed():
        return None
    return given


def _observed() -> bool:
    """Whether a torch mode, a transform, a trace, a global hook or a capture of outputs observes or changes
    operations."""
    return bool(
        observed()
        or nn.modules.module._global_forward_hooks
        or nn.modules.module._global_forward_pre_hooks
        or _active_collector.get()
    )


def _run(base: Any, given: Mapping[str, Any]) -> Any:
    """One native pass; None, without adding tokens to the cache, if it would not compute the same."""
    plan = plan_of(base)
    if plan is None:
        return None
    embeds = given.get("inputs_embeds")
    rows, tokens = (given["input_ids"] if embeds is None else embeds).shape[:2]
    cache = given.get(base.cache_word)
    if cache is None and given.get("use_cache", base.config.use_cache):
        cache = DynamicCache(config=base.config)
    if not rows * tokens or (cache is not None and not (rows == 1 and _in_blocks(cache, base, plan))):
        return None
    before = 0 if cache is None else cache.get_seq_length()
    here = torch.arange(before, before + tokens)
    mask, places = given.get("attention_mask"), given.get("cache_position")
    if mask is not None and not (tuple(mask.shape) == (rows, before + tokens) and bool(mask.all())):
        return None
    if places is not None and not torch.equal(places.flatten(), here):
        return None
    positions = given.get("position_ids", here[None])
    if positions.dim() != 2 or positions.shape[1] != tokens or not bool((positions.diff() == 1).all()):
        return None  # several sequences in one row, which must not attend to each other
    embedding, rotary = base.get_submodule(plan.words.embedding), base.get_submodule(plan.words.rotary)
    if embeds is None:
        embeds = embedding(given["input_ids"])
    stream = embeds.to(torch.float32, copy=True).contiguous()
    angles = rotary(stream, position_ids=positions)
    if (runs_own_code(embedding) or runs_own_code(rotary)) and plan_of(base) is not plan:
        return None  # their code has changed the model
    cosine, sine = (table.float().contiguous() for table in angles)
    for row in range(rows):
        own = min(row, cosine.shape[0] - 1)
        if not plan.decoder.run(stream[row], cosine[own], sine[own], _kept_in(cache, plan)):
            return None
    output: dict[str, Any] = {"last_hidden_state": stream.to(embeds.dtype), base.cache_word: cache}
    return BaseModelOutputWithPast(**output)


def renamed(kwargs: dict[str, Any], word: str) -> dict[str, Any]:
    """Arguments with the cache under this transformers' name for it; unchanged if both names are given."""
    other = CACHE[1 - CACHE.index(word)]
    if other not in kwargs or word in kwargs:
        return kwargs
    return {word if name == other else name: value for name, value in kwargs.items()}


def _in_blocks(cache: Any, base: Any, plan: NativePlan) -> bool:
    """Whether a cache stores blocks of one sequence.

    An empty dynamic cache, as ``generate`` creates it, is converted to blocks with the settings in the model's config.
    """
    layers = getattr(cache, "layers", [])
    if len(layers) <= max(slot for slot in plan.slots if slot is not None):
        return False
    if all(type(layer) is BlockLayer for layer in layers):
        return all(layer.blocks is None or layer.batch == 1 for layer in layers)
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length():
        return False
    if not all(map(may_be_blocks, layers)):
        return False
    keeping = _keeping(base)
    layers[:] = [BlockLayer(keeping) for _ in layers]
    return True


def _kept_in(cache: Any, plan: NativePlan) -> list[Blocks | None]:
    """The blocks of each layer: those of a cache, or temporary ones without a cache."""
    kept: list[Blocks | None] = []
    for slot, heads in zip(plan.slots, plan.decoder.heads, strict=True):
        layer = BlockLayer() if cache is None or slot is None else cache.layers[slot]
        kept.append(None if slot is None else layer.open(1, heads, plan.decoder.width))
    return kept


def _keeping(base: Any) -> Keeping:
    """The block settings in a model's config, for caches that ``generate`` creates."""
    return Keeping.of(getattr(getattr(base.config, "quantization_config", None), "cache", {}))


def plan_of(base: Any) -> NativePlan | None:
    """The plan of a base model's native run in its current state; None if it has none. A change causes a new plan."""
    known: tuple[NativePlan | None, Watch] | None = vars(base).get("_pliant_native")
    is_checked = known is not None and known is getattr(checked, "known", None)
    if not is_checked and (known is None or not known[1].unchanged()):
        known = _read(base)
    assert known is not None
    plan, watch = known
    if plan is None or len(plan.slots) != base.config.num_hidden_layers or not (is_checked or watch.evaluating()):
        return None  # some of its layers are skipped, or in training mode
    return plan


def _read(base: Any) -> tuple[NativePlan | None, Watch]:
    watch = watch_of(base)
    try:
        known = read_plan(base, watch), watch
    except (UnlikeError, ArchitectureError, PackedError, AttributeError):
        known = None, watch
    base._pliant_native = known
    return known


def cached_bytes(model: nn.Module) -> int | None:
    """Bytes per token in the packed cache of a model that runs natively; None for any other model."""
    base: Any = getattr(model, "base_model", model)
    plan = plan_of(base) if isinstance(base, Native) else None
    if plan is None:
        return None
    return round(sum(per_token(_keeping(base), heads, plan.decoder.width) for heads in plan.decoder.heads if heads))
