"""A simulated Apple GPU: its tensors are on the CPU but report the device mps, and operations that such a GPU refuses
raise: tensors of two devices in one operation, float64, numpy."""

from __future__ import annotations

import copy

import torch
from torch.overrides import TorchFunctionMode

THERE = torch.device("mps")
_INDEXED = {"__getitem__", "__setitem__", "index_put_", "index_put"}  # indices may be on the CPU
_CROSSING = {"copy_", "to", "cpu", "__set__", "_has_compatible_shallow_copy_type", *_INDEXED}


class Elsewhere(torch.Tensor):
    """A tensor on the simulated device, while :class:`FakeDevice` is active."""


class WanderingError(AssertionError):
    """An operation that the device would refuse."""


class FakeDevice(TorchFunctionMode):
    """While active, ``device="mps"`` creates such tensors, and every operation on them is checked."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":  # they name a device and touch no tensor
            return func(*args, **kwargs)
        owner = getattr(
            getattr(func, "__self__", None), "__name__", ""
        )  # "device" where it is the getter of that property
        given = list(_leaves((args, kwargs)))
        tensors = [one for one in given if isinstance(one, torch.Tensor)]
        here = any(isinstance(one, Elsewhere) for one in tensors)
        if owner in ("device", "is_cpu") and name == "__get__":
            return (THERE if owner == "device" else False) if here else func(*args, **kwargs)
        named = [torch.device(one) for one in given if isinstance(one, torch.device) or one in ("mps", "cpu")]
        if name == "to" and len(tensors) > 1:
            named = [THERE if isinstance(tensors[1], Elsewhere) else torch.device("cpu")]
        if here and name == "numpy":
            raise WanderingError("numpy of a tensor that is elsewhere")
        apart = any(not isinstance(one, Elsewhere) and one.dim() for one in tensors)  # a number may be anywhere
        if here and apart and name not in _CROSSING and not named:
            raise WanderingError(f"{name} of tensors of two devices")
        self.operations += here
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*_on_cpu(args), **_on_cpu(kwargs))
        if name == "copy_" or name in _INDEXED:
            there = isinstance(args[0], Elsewhere)
        else:
            there = named[0].type == "mps" if named else here and name != "cpu"
        return _placed(out, there, name)


def _on_cpu(value):
    """Arguments with the simulated device replaced by the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(one) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_on_cpu(one) for one in value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value == "mps" else value


def _leaves(value):
    if type(value) in (tuple, list):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, torch.Tensor | torch.device | str):
        yield value


def _placed(out, there, name):
    """The result of an operation, placed on its device."""
    if isinstance(out, torch.Tensor):
        if there and out.dtype == torch.float64:
            raise WanderingError(f"{name} gives float64, which the device does not have")
        if there == isinstance(out, Elsewhere):
            return out
        return out.as_subclass(Elsewhere if there else torch.Tensor)
    if type(out) in (tuple, list):
        return type(out)(_placed(one, there, name) for one in out)
    if type(out).__module__ == "torch.return_types":
        return type(out)([_placed(one, there, name) for one in out])
    return out


def moved(model):
    """A copy of a model on the simulated device."""
    model = copy.deepcopy(model)
    seen = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.nn.Parameter(parameter.detach().clone().as_subclass(Elsewhere), parameter.requires_grad)
                module._parameters[key] = seen.setdefault(id(parameter), there)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.clone().as_subclass(Elsewhere)
    return model
