"""Notice when something on the way through a model's layers is no longer what it was."""

from __future__ import annotations

import itertools
from operator import itemgetter
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pliant.anatomy import Null
from pliant.runtime.linear import Packed

OWN = (Packed, Null)
KNOWN = ("transformers.models.", "transformers.activations", "torch.nn.modules.")  # where other classes may come from
CAPTURE = "transformers.utils.output_capturing"  # its hooks do nothing unless outputs of layers are asked for

_training = itemgetter("training")


class Watch:
    """What a native run takes for granted of modules: their classes, children, tensors, hooks, and attributes that were read.

    Looking at all of it takes some microseconds a layer.

    Arguments:
        modules: whose work the run does.
        owners: other modules whose children it relies on.
        config: of the model.
    """

    def __init__(self, modules: list[nn.Module], owners: list[nn.Module], config: Any):
        self.modules = modules
        self.spaces = [vars(module) for module in modules]
        self.held = [vars(owner)["_modules"] for owner in owners]
        kinds = ("_modules", "_parameters", "_buffers")
        self.held += [space[kind] for space in self.spaces for kind in kinds if space[kind]]
        self.hooks = [space[kind] for space in self.spaces for kind in ("_forward_pre_hooks", "_forward_hooks")]
        self.classes = sorted({type(module) for module in modules}, key=str)
        self.plain: list[tuple[dict[str, Any], str]] = []
        self.config = config
        self.settle()

    def settle(self) -> None:
        """Take what there is now for granted."""
        self.kept = [*itertools.chain.from_iterable(map(dict.values, self.held))]  # alive, so that no id is given twice
        self.state = self._now()

    def read(self, module: nn.Module, key: str) -> Any:
        """A plain attribute, None where there is none, which is watched from then on."""
        self.plain.append((vars(module), key))
        return vars(module).get(key)

    def setting(self, key: str) -> Any:
        """A value of the config, watched from then on."""
        self.plain.append((vars(self.config), key))
        return getattr(self.config, key, None)

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        return self._now() == self.state

    def evaluating(self) -> bool:
        """Whether every module is in evaluation mode."""
        return not any(map(_training, self.spaces))

    def foreign(self) -> str:
        """Code that is not known to be that of the modules: in words, or nothing."""
        for module, space in zip(self.modules, self.spaces, strict=True):
            kind = type(module)
            theirs = kind.__module__.startswith(KNOWN) and kind.forward.__module__.startswith(KNOWN)
            if kind not in OWN and not theirs:
                return f"it has modules of {kind.__module__}.{kind.__qualname__}"
            if "forward" in space:
                return f"a {kind.__name__} has a forward of its own"
            hooks = [*space["_forward_pre_hooks"].values(), *space["_forward_hooks"].values()]
            if any(getattr(hook, "__module__", "") != CAPTURE for hook in hooks):
                return f"a {kind.__name__} has a hook"
        name, *functions = _interfaces(self.config)
        if any(function and not function.__module__.startswith("transformers.") for function in functions):
            return f"its attention is computed by {name!r}, which transformers does not ship"
        return ""

    def _now(self) -> list[list[Any]]:
        return [
            [*map(type, self.modules)],
            [*map(len, self.spaces)],  # a ``forward`` of its own, or anything else that was hung on a module
            [*map(id, itertools.chain.from_iterable(map(dict.values, self.held)))],
            [*map(len, self.hooks)],
            [space.get(key) for space, key in self.plain],
            [kind.forward for kind in self.classes],
            _interfaces(self.config),
        ]


def _interfaces(config: Any) -> list[Any]:
    """How attention is computed and masked: a name and two functions."""
    name = config._attn_implementation
    return [name, ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)]
