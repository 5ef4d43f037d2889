"""``generate`` of a model that runs natively: torch on one thread, and one check for changes where that is enough."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from transformers import LogitsProcessorList, StoppingCriteriaList

from pliant.compat.native import Native, checked, plan_of, renamed
from pliant.compat.watch import only_known_code
from pliant.runtime.packed_linear import Packed
from pliant.runtime.threads import threads, torch_on_all, torch_on_one

CALLED = ("logits_processor", "stopping_criteria")  # arguments of generate: lists of functions called at every token
CALLING = (*CALLED, "prefix_allowed_tokens_fn", "streamer")  # those that run code of the caller
BRING = ("assistant_model", "custom_generate")  # arguments of generate that add a model or a loop of their own


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``generate``, with torch on one thread if the heavy work is native. The caller's own functions run
    with all threads."""
    own = type(model).generate
    if not isinstance(model.base_model, Native):
        return own(model, *args, **kwargs)
    kwargs = renamed(kwargs, model.base_model.cache_word)
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
        checked.known = model.base_model._pliant_native
    try:
        yield
    finally:
        checked.known = None


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
