"""``import pliant`` is all it takes for ``AutoModelForCausalLM.from_pretrained`` to rebuild per-layer shapes.

transformers has an official registry of stand-ins for its layer classes, honoured while a model is being loaded. A stand-in
is registered for a family at the moment its modeling file is imported, so that importing pliant costs nothing. The
stand-in is never instantiated: calling it gives a layer of the original class, cut to the shapes in the config.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "transformers.models."


def install() -> None:
    """Arrange for every family's layers to be registered when (or because already) its modeling file is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, module in list(sys.modules.items()):
        if _is_modeling(name):
            register(module)


def register(module: ModuleType) -> None:
    """Register stand-ins for the decoder layers that a modeling file defines."""
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

    from pliant.architecture import catalogue

    family = module.__name__.split(".")[-2]
    if family not in catalogue():
        return
    for name, layer_class in list(vars(module).items()):
        own = isinstance(layer_class, type) and layer_class.__module__ == module.__name__
        if own and name.endswith(("DecoderLayer", "Block")) and name not in get_patch_mapping():
            register_patch_mapping({name: _stand_in(layer_class)})


def _stand_in(original: type) -> type:
    """A class that answers like ``original`` but whose call builds a layer with the shapes its config asks for."""

    class Shaping(type(original)):
        def __call__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
            if not getattr(config, "is_heterogeneous", False):
                return original(config, *args, **kwargs)
            return _build(original, config, *args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, original)

    return Shaping(original.__name__, (original,), {"__module__": original.__module__, "__doc__": original.__doc__})


def _build(original: type, config: Any, *args: Any, **kwargs: Any) -> Any:
    from pliant.anatomy import plain_config
    from pliant.architecture import architecture_of
    from pliant.checkpoint.schema import shape_layer

    plain = plain_config(config)
    layer = original(plain, *args, **kwargs)
    for module in layer.modules():
        if getattr(module, "config", None) is plain:
            module.config = config  # later changes of the model's config must reach its layers
    index = kwargs["layer_idx"] if "layer_idx" in kwargs else args[0]
    shape_layer(layer, index, config, architecture_of(config.model_type))
    return layer


def _is_modeling(name: str) -> bool:
    return name.startswith(_PACKAGE) and name.rpartition(".")[2].startswith("modeling_")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers' modeling files the usual way and has ``register`` called once they are executed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _is_modeling(fullname):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, register)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[ModuleType], None]):
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_data …: inspect and the debugger ask for them
        return getattr(self._loader, name)
