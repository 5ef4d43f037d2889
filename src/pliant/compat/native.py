"""Run the layers of a transformers model in one native call, if that computes the same.

The base of a packed model gets a subclass of its own class. Its ``forward`` passes all layers to :mod:`pliant.runtime.decoder`
if every argument is known, no module is hooked or replaced, and the model is in evaluation mode without gradients. Otherwise
the class of transformers computes layer by layer, with the same packed weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import _active_collector

from pliant.compat.block_cache import BlockLayer, may_be_blocks
from pliant.compat.plan import NativePlan, UnlikeError, read_plan, watch_of
from pliant.compat.watch import Watch, only_known_code, runs_own_code
from pliant.errors import ArchitectureError, PackedError
from pliant.runtime.kv_blocks import Blocks, Keeping, per_token
from pliant.runtime.library import library
from pliant.runtime.packed_linear import Packed
from pliant.runtime.threads import threads, torch_on_all, torch_on_one
from pliant.torch_private import observed

NUDGE = 1e-6  # relative input perturbation of the size of rounding, to measure how much 8-bit activations amplify it
AGREEMENT = 1e-3  # allowed relative difference of hidden states, besides the amplified rounding
TRIED = 16  # tokens on which native and transformers' code are compared
CACHE = ("cache", "past_key_values")  # names of one argument: since 5.24 of transformers, and before
KNOWN = {  # arguments of forward that a native run handles
    *("input_ids", "attention_mask", "position_ids", *CACHE, "inputs_embeds", "use_cache"),
    *("cache_position", "return_dict", "output_attentions", "output_hidden_states"),
}
TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")  # those of them that are
CALLED = ("logits_processor", "stopping_criteria")  # arguments of generate: lists of functions called at every token
CALLING = (*CALLED, "prefix_allowed_tokens_fn", "streamer")  # those that run code of the caller
BRING = ("assistant_model", "custom_generate")  # arguments of generate that add a model or a loop of their own

# known: plan and watch of a base that does not change until generate returns in this thread
_checked = threading.local()


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
        kwargs = _renamed(kwargs, word)
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
    """Whether a torch mode, a transform, a trace, a global hook or a capture of outputs observes or changes operations."""
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


def _renamed(kwargs: dict[str, Any], word: str) -> dict[str, Any]:
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
    checked = known is not None and known is getattr(_checked, "known", None)
    if not checked and (known is None or not known[1].unchanged()):
        known = _read(base)
    assert known is not None
    plan, watch = known
    if plan is None or len(plan.slots) != base.config.num_hidden_layers or not (checked or watch.evaluating()):
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


def run_natively(model: nn.Module) -> str:
    """Make the base of a packed model run natively if it can. Native and transformers' code are compared on a few tokens at the
    beginning and at the end of the context, and by generating a few tokens.

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
        vars(model)["generate"] = functools.partial(_generate, model)
    return ""


def how_it_runs(model: nn.Module) -> dict[str, Any]:
    """Make a packed model run natively if it can; return ``native`` (whether it does) and ``why_not_native`` (the reason)."""
    why_not = run_natively(model)
    return {"native": not why_not, "why_not_native": why_not}


def _starts(base: Any) -> list[int]:
    """The positions to compare at: the first, and the last of the model's context."""
    return sorted({0, max(0, getattr(base.config, "max_position_embeddings", 0) - TRIED)})


@torch.inference_mode()
def _try(base: Any, start: int, factor: float = 1.0) -> torch.Tensor:
    """Hidden states of ``TRIED`` tokens from position ``start``, computed in float32; ``factor`` scales the embeddings."""
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


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``generate``, with torch on one thread if the heavy work is native. The caller's own functions run with all
    threads."""
    own = type(model).generate
    if not isinstance(model.base_model, Native):
        return own(model, *args, **kwargs)
    kwargs = _renamed(kwargs, model.base_model.cache_word)
    if threads() == 1 or "forward" in vars(model) or not isinstance(model.get_output_embeddings(), Packed):
        return own(model, *args, **kwargs)
    given = inspect.signature(own).bind(model, *args, **kwargs)
    others = {**given.arguments, **given.arguments.get("kwargs", {})}
    if any(others.get(name) is not None for name in BRING):
        return own(model, *args, **kwargs)
    try:
        for name in CALLED:
            if given.arguments.get(name):
                given.arguments[name] = _all_on_all(given.arguments[name])
        if given.arguments.get("prefix_allowed_tokens_fn"):
            given.arguments["prefix_allowed_tokens_fn"] = _on_all(given.arguments["prefix_allowed_tokens_fn"])
    except TypeError:  # one of them cannot be wrapped
        return own(model, *args, **kwargs)
    with torch_on_one(), _checked_once(model, any(others.get(name) for name in CALLING)):
        return own(*given.args, **given.kwargs)


@contextlib.contextmanager
def _checked_once(model: Any, calling: bool) -> Iterator[None]:
    """Check for changes once instead of at every token, if only code of transformers runs in between.

    Each check reads thousands of objects that the weights have displaced from the processor's caches.

    Arguments:
        calling: whether code of the caller runs.
    """
    if not calling and only_known_code(model) and plan_of(model.base_model) is not None:
        _checked.known = model.base_model._pliant_native
    try:
        yield
    finally:
        _checked.known = None


def _all_on_all(functions: Any) -> Any:
    """The same list of functions, each running with all threads.

    Raises:
        TypeError: the list or one of the functions is of a kind that cannot be rebuilt.
    """
    if type(functions) not in (list, LogitsProcessorList, StoppingCriteriaList):
        raise TypeError(f"a {type(functions).__name__} cannot be rebuilt")
    return type(functions)(map(_on_all, functions))


def _on_all(function: Any) -> Any:
    """The same function or callable object, running with all threads.

    Raises:
        TypeError: the object cannot be rebuilt.
    """
    kind = type(function)
    if kind.__module__.startswith("transformers."):
        return function  # it is cheap, and generate checks its type

    def with_all(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            with torch_on_all():
                return call(*args, **kwargs)

        return called

    if inspect.isroutine(function):
        return with_all(function)
    if any(vars(base).get("__slots__") for base in kind.__mro__) or not hasattr(function, "__dict__"):
        raise TypeError(f"a {kind.__name__} keeps its state in slots")
    twin = object.__new__(type(kind.__name__, (kind,), {"__call__": with_all(kind.__call__)}))
    twin.__dict__ = function.__dict__  # shared, so that the caller's object sees its state change
    return twin


def cached_bytes(model: nn.Module) -> int | None:
    """Bytes per token in the packed cache of a model that runs natively; None for any other model."""
    base: Any = getattr(model, "base_model", model)
    plan = plan_of(base) if isinstance(base, Native) else None
    if plan is None:
        return None
    return round(sum(per_token(_keeping(base), heads, plan.decoder.width) for heads in plan.decoder.heads if heads))
