"""Detect changes to a model's modules, tensors and hooks since it was read for a native run."""

from __future__ import annotations

import copy
import inspect
import sys
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pliant.anatomy import Null, NullNorm
from pliant.runtime.packed_linear import Packed

OWN = (Packed, Null, NullNorm)
KNOWN = ("transformers.models.", "transformers.activations", "torch.nn.modules.")  # packages of other allowed classes
FUNCTIONS = (  # of a modeling file, where a native run does their work
    *("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward"),
    *("create_causal_mask", "create_sliding_window_causal_mask"),
)
PACKAGES = ("torch", "transformers", "pliant", "huggingface_hub", "typing", "abc", "builtins")
CAPTURE = "transformers.utils.output_capturing"  # its hooks do nothing unless outputs of layers are asked for
ATTENTION = functional.scaled_dot_product_attention

_END = object()
_training = itemgetter("training")


class Watch:
    """The state of modules that a native run relies on: classes, children, tensors, hooks, and the attributes that were
    read.

    It is checked before each native call. That reads thousands of objects, which the weights have displaced from the
    caches.

    Arguments:
        modules: the modules that the run replaces.
        owners: other modules whose children it relies on.
        config: the model's config.
    """

    def __init__(self, modules: list[nn.Module], owners: list[nn.Module], config: Any):
        self.modules, self.config = modules, config
        self.spaces = [vars(module) for module in modules]
        kinds = ("_modules", "_parameters", "_buffers")
        self.held = [vars(owner)["_modules"] for owner in owners]
        self.held += [space[kind] for space in self.spaces for kind in kinds if space[kind]]
        self.read_from: list[dict[str, Any]] = []
        self.read_keys: list[str] = []
        self.settle()

    def settle(self) -> None:
        """Record the current state as the expected one."""
        hooks = [space[kind] for space in self.spaces for kind in ("_forward_pre_hooks", "_forward_hooks")]
        self.unhooked = [each for each in hooks if not each]
        self.hooked = [each for each in hooks if each]
        self.hooks = [list(each.values()) for each in self.hooked]
        self.types = [*map(type, self.modules)]
        self.sizes = [*map(len, self.spaces)]  # grows when a forward or any other attribute is set on a module
        self.things = [*chain.from_iterable(map(dict.values, self.held)), _END]
        self.tensors = [thing for thing in self.things if isinstance(thing, torch.Tensor)]
        self.places = [*map(torch.Tensor.data_ptr, self.tensors)]  # changes when a parameter gets other data
        values = map(dict.get, self.read_from, self.read_keys)
        self.values = [copy.deepcopy(value) if isinstance(value, list | dict) else value for value in values]
        self.classes = list(set(self.types))
        self.calls = [(kind.__call__, kind.forward) for kind in self.classes]
        self.interfaces = _interfaces(self.config)

    def unchanged(self) -> bool:
        """Whether the state is still the recorded one."""
        return (
            not any(self.unhooked)
            and all(map(is_, map(type, self.modules), self.types))
            and all(map(is_, chain(chain.from_iterable(map(dict.values, self.held)), (_END,)), self.things))
            and [*map(len, self.spaces)] == self.sizes
            and [*map(dict.get, self.read_from, self.read_keys)] == self.values
            and [list(each.values()) for each in self.hooked] == self.hooks
            and [*map(torch.Tensor.data_ptr, self.tensors)] == self.places
            and [(kind.__call__, kind.forward) for kind in self.classes] == self.calls
            and _interfaces(self.config) == self.interfaces
        )

    def read(self, module: nn.Module, key: str) -> Any:
        """A plain attribute of a module, or None; it is watched from then on."""
        return self._note(vars(module), key)

    def setting(self, key: str) -> Any:
        """A value of the config, watched from then on."""
        return self._note(vars(self.config), key)

    def functions(self, kind: type) -> str:
        """Watch the functions that a class's modeling file calls; return the name of a replaced one, or an empty
        string."""
        names = vars(sys.modules[kind.__module__])
        called = {name: self._note(names, name) for name in FUNCTIONS}
        return next((n for n, f in called.items() if f and not f.__module__.startswith("transformers.")), "")

    def _note(self, space: dict[str, Any], key: str) -> Any:
        self.read_from.append(space)
        self.read_keys.append(key)
        return space.get(key)

    def evaluating(self) -> bool:
        """Whether every module is in evaluation mode."""
        return not any(map(_training, self.spaces))

    def foreign(self) -> str:
        """A description of the first class, forward, hook or attention function that is not known; empty if all are
        known."""
        for module, space in zip(self.modules, self.spaces, strict=True):
            kind = type(module)
            theirs = kind.__module__.startswith(KNOWN) and kind.forward.__module__.startswith(KNOWN)
            theirs = theirs or kind in OWN
            if not theirs or not kind.__call__.__module__.startswith(("torch.", "transformers.")):
                return f"it has modules of {kind.__module__}.{kind.__qualname__}"
            if "forward" in space:
                return f"the forward of a {kind.__name__} was replaced"
            hooks = [*space["_forward_pre_hooks"].values(), *space["_forward_hooks"].values()]
            if any(getattr(hook, "__module__", "") != CAPTURE for hook in hooks):
                return f"a {kind.__name__} has a hook"
        if functional.scaled_dot_product_attention is not ATTENTION:
            return "torch's scaled_dot_product_attention was replaced"
        name, *functions, _ = _interfaces(self.config)
        if any(function and not function.__module__.startswith("transformers.") for function in functions):
            return f"its attention is computed by {name!r}, which transformers does not ship"
        return ""


def runs_own_code(module: nn.Module) -> bool:
    """Whether a module has hooks, a forward of its own, or a class that is not of torch or transformers."""
    space = vars(module)
    hooked = space["_forward_pre_hooks"] or space["_forward_hooks"]
    return bool(hooked) or "forward" in space or not _known(type(module))


def only_known_code(model: nn.Module) -> bool:
    """Whether every module of a model, and every function on it, is code of torch, transformers or pliant."""
    modules = list(model.modules())
    for module in modules:
        space = vars(module)
        if space["_forward_pre_hooks"] or space["_forward_hooks"]:
            return False
        own = (value for name, value in space.items() if name != "generate" and inspect.isroutine(value))
        if not all(map(_known, own)):
            return False
    bases = {base for kind in {*map(type, modules)} for base in kind.__mro__}
    return all(map(_known, bases)) and all(
        _known(value) for base in bases for value in vars(base).values() if inspect.isroutine(value)
    )


def _known(code: Any) -> bool:
    return (getattr(code, "__module__", None) or "builtins").partition(".")[0] in PACKAGES


def _interfaces(config: Any) -> list[Any]:
    """The attention implementation: its name, its attention function and its mask function, and torch's own
    attention."""
    name = config._attn_implementation
    own = functional.scaled_dot_product_attention
    return [name, ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name), own]
