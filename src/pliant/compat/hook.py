"""What pliant adds to transformers, done when the module that it concerns is imported, or at once where it has been.

``import pliant`` itself so loads neither transformers nor torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pliant.compat import dequantized, layers, outputs, quiet, remote

_MODELS = "transformers.models."
_SEEN_TO = {
    "transformers.quantizers.auto": lambda _: importlib.import_module("pliant.compat.packed_quantizer"),
    outputs.MODULE: outputs.register,
    dequantized.MODULE: dequantized.forget_with_the_config,
    remote.MODULE: remote.wrap_remote_models,
}


def install() -> None:
    """Arrange for every module that concerns pliant to be seen to when, or because already, it is imported."""
    quiet.silence()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, module in list(sys.modules.items()):
        if (see_to := _concern(name)) is not None:
            see_to(module)


def _concern(name: str) -> Callable[[ModuleType], Any] | None:
    """What is done with a module of that name, if anything."""
    if name.startswith(_MODELS) and name.rpartition(".")[2].startswith("modeling_"):
        return layers.wrap_models
    return _SEEN_TO.get(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds such modules the usual way and has them seen to once they are executed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        see_to = _concern(fullname)
        if see_to is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, see_to)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, see_to: Callable[[ModuleType], None]):
        self._loader = loader
        self._see_to = see_to

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._see_to(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_data …: inspect and the debugger ask for them
        return getattr(self._loader, name)
