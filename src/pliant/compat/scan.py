"""Replace the scans of state-space models in transformers, and watch them.

The functions that transformers' mixers call are replaced in the modeling files when these are imported, by those of
``cpu_scans.py``, which also run scans whose state was removed. A call that has an unknown argument or tensors on
another device, or that is compiled or traced, goes to transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from pliant.architecture.format import EMPTY_STATE
from pliant.compat.cpu_scans import mamba2_chunk_scan, mamba2_selective_state_update, mamba_selective_scan, step_sizes


class ScanInputs(NamedTuple):
    """The tensors that one call of a scan reads, in one layout for Mamba-1 and Mamba-2.

    A channel of Mamba-1 is a head of width 1. After each token the state of a head is ``h = exp(dt A) h + dt B x``; the
    scan returns ``C h`` and its skip.

    Attributes:
        x: shape ``(batch, tokens, heads, width)``.
        dt: step sizes, shape ``(batch, tokens, heads)``.
        A: shape ``(heads, state)``, or ``(heads, 1)`` if all units of the state decay alike.
        B, C: shape ``(batch, tokens, groups, state)``.
    """

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any


WatchOutput = Callable[[Any, Any], None]
WatchInputs = Callable[[ScanInputs], Any]
_watches: list[WatchOutput] = []
_input_watches: list[WatchInputs] = []


@contextmanager
def watched_scans(watch: WatchOutput) -> Iterator[None]:
    """Context in which every scan of a sequence shows its input and its output to ``watch``.

    Both have the shape ``(batch, tokens, units, width)``: heads, or the channels of Mamba-1, whose width is 1. The
    output contains the skip ``D``, but not yet the gate.
    """
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


@contextmanager
def watched_scan_inputs(watch: WatchInputs) -> Iterator[None]:
    """Context in which every scan of a sequence shows its inputs to ``watch``, and goes on with the C that this
    returns. A scan with an argument that pliant does not know shows nothing."""
    _input_watches.append(watch)
    try:
        yield
    finally:
        _input_watches.remove(watch)


def wrap_scans(module: ModuleType) -> None:
    """Replace the scan functions that a modeling file has."""
    for name, (scan, by_unit) in _SCANS.items():
        if (original := _unwrapped(module, name)) is not None:
            setattr(module, name, _watchable(original, scan, by_unit))
    for name, step in _STEPS.items():
        if (original := _unwrapped(module, name)) is not None:
            setattr(module, name, _wrapped(original, step))


def _unwrapped(module: ModuleType, name: str) -> Callable[..., Any] | None:
    original = getattr(module, name, None)
    return None if hasattr(original, EMPTY_STATE) else original


def _wrapped(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pliant that leaves calls to transformers if it does not know an argument that is set, or returns
    None."""
    known = inspect.signature(function).parameters.keys()

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = _set(kwargs)
        result = function(*args, **given) if given.keys() <= known else None
        return original(*args, **kwargs) if result is None else result

    setattr(run, EMPTY_STATE, False)
    return run


def _set(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are set; mixers pass on what their model was called with."""
    return {
        name: value
        for name, value in kwargs.items()
        if value is not None and value is not False and name != "output_router_logits"
    }


def _watchable(
    original: Callable[..., Any], scan: Callable[..., Any], by_unit: Callable[[Any], Any]
) -> Callable[..., Any]:
    """A scan of pliant that is watched, see :func:`watched_scans` and :func:`watched_scan_inputs`."""
    parameters = inspect.signature(scan)
    compute = _wrapped(original, scan)

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        for watch in _input_watches:
            args, kwargs = seen(watch, args, kwargs)
        result = compute(*args, **kwargs)
        if _watches:
            output = result if kwargs.get("z") is None else compute(*args, **{**kwargs, "z": None})
            for watch in _watches:
                watch(by_unit(args[0]), by_unit(output[0] if isinstance(output, tuple) else output))
        return result

    def seen(watch: WatchInputs, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with the C that ``watch`` returns."""
        try:
            bound = parameters.bind(*args, **_set(kwargs))
        except TypeError:  # an argument that the scan does not know
            return args, kwargs
        bound.apply_defaults()
        ours = _watched(watch, scan, bound.arguments)
        return (args, {**kwargs, "C": ours}) if "C" in kwargs else ((*args[:4], ours, *args[5:]), kwargs)

    setattr(run, EMPTY_STATE, True)
    return run


def _watched(watch: WatchInputs, scan: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """The C that ``watch`` returns, in the layout of the scan."""
    x, dt, A, B, C = (given[name] for name in ("hidden_states", "dt", "A", "B", "C"))
    if scan is mamba2_chunk_scan:
        dt = step_sizes(dt, given["dt_bias"], given["dt_softplus"]).clamp(*given["dt_limit"])
        return watch(ScanInputs(x, dt, A[:, None], B, C))
    bias = given["delta_bias"]
    dt = step_sizes(dt, None if bias is None else bias[:, None], given["delta_softplus"])
    B, C = (tensor.transpose(1, 2).unsqueeze(2) for tensor in (B, C))
    C = watch(ScanInputs(x.transpose(1, 2).unsqueeze(3), dt.transpose(1, 2), A, B, C))
    return C.squeeze(2).transpose(1, 2)


_SCANS = {
    "mamba2_chunk_scan": (mamba2_chunk_scan, lambda x: x),
    "mamba_selective_scan": (mamba_selective_scan, lambda x: x.transpose(1, 2).unsqueeze(-1)),
}
"""Name in the modeling files -> pliant's scan, and what brings its input and output into one shape for watching."""
_STEPS = {"mamba2_selective_state_update": mamba2_selective_state_update}
