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
from pliant.compat.cpu_scans import (
    mamba2_chunk_scan,
    mamba2_selective_state_update,
    mamba_selective_scan,
    mamba_selective_state_update,
    step_sizes,
)


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
    for mixer in list(vars(module).values()):
        if isinstance(mixer, type) and mixer.__module__ == module.__name__ and _splits_steps(mixer):
            mixer.forward = _without_steps(mixer.forward)


def _splits_steps(mixer: type) -> bool:
    """Whether a class is a mixer of Mamba-2, which splits the step sizes off the output of ``in_proj``."""
    names = getattr(inspect.unwrap(vars(mixer).get("forward", len)), "__code__", None)
    return names is not None and {"in_proj", "conv_dim", "num_heads", "ssm_state_size"} <= {*names.co_names}


def _without_steps(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a mixer whose scan may be gone, and with it the rows of ``in_proj`` that give step sizes.

    transformers splits these off by their number, so zeros take their place. Its fused pass, for training, has no form
    without a state.
    """
    if hasattr(forward, EMPTY_STATE):
        return forward

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.ssm_state_size:
            return forward(self, *args, **kwargs)
        from torch.nn import functional

        def pad(_projection: Any, _inputs: Any, output: Any) -> Any:
            missing = self.intermediate_size + self.conv_dim + self.num_heads - output.shape[-1]
            return functional.pad(output, (0, missing))

        training, handle = self.training, self.in_proj.register_forward_hook(pad)
        self.training = False
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.training = training
            handle.remove()

    setattr(run, EMPTY_STATE, True)
    return run


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
    """The arguments that are set; mixers pass on what their model was called with, and the rotary angles of zamba2."""
    return {
        name: value
        for name, value in kwargs.items()
        if value is not None and value is not False and name not in ("output_router_logits", "position_embeddings")
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
        if not bound.arguments["B"].numel():  # the scan has no state
            return args, kwargs
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
_STEPS = {
    "mamba2_selective_state_update": mamba2_selective_state_update,
    "mamba_selective_state_update": mamba_selective_state_update,
}
