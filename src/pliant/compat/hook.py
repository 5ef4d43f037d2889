"""Patch modules of transformers when they are imported, or at once if they already are.

So ``import pliant`` itself loads neither transformers nor torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pliant.compat import dequantized, layers, multipliers, outputs, quiet, remote, scan

_MODELS = "transformers.models."
_PATCHES = {
    "transformers.quantizers.auto": lambda _: importlib.import_module("pliant.compat.packed_quantizer"),
    outputs.MODULE: outputs.register,
    dequantized.MODULE: dequantized.forget_with_the_config,
    remote.MODULE: remote.wrap_remote_models,
}


def install() -> None:
    """Patch the modules that are imported already, and arrange for the others to be patched when they are imported."""
    quiet.silence()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, module in list(sys.modules.items()):
        if (patch := _patch_of(name)) is not None:
            patch(module)


def _patch_of(name: str) -> Callable[[ModuleType], Any] | None:
    """The patch for a module of that name; None if it needs none."""
    if name.startswith(_MODELS) and name.rpartition(".")[2].startswith("modeling_"):
        return _patch_modeling
    return _PATCHES.get(name)


def _patch_modeling(module: ModuleType) -> None:
    layers.wrap_models(module)
    scan.wrap_scans(module)
    multipliers.wrap_multipliers(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds such modules the usual way and has them patched once they are executed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        patch = _patch_of(fullname)
        if patch is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, patch)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, patch: Callable[[ModuleType], None]):
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_data …: inspect and the debugger ask for them
        return getattr(self._loader, name)
