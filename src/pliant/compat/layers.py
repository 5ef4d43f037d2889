"""``import pliant`` is all it takes for ``AutoModelForCausalLM.from_pretrained`` to rebuild per-layer shapes.

transformers reads ``per_layer_config`` into its configs since 5.14 and builds no model from it (checked: 5.14 to 5.23): it
refuses such a config. Until it does, the constructors of a family's model classes are wrapped when its modeling file is
imported: the one that makes the list of layers builds it full-size (on no memory at all inside ``from_pretrained``) and
has it cut. For any other config the wrapper only calls the original. The official registry of stand-in classes
(``transformers.monkey_patching``) would do for layers that are told their number, but with anything registered each load
of any model walks every name of the package first: 0.6 s, where loading a tiny model takes 0.03 s
(``benchmarks/load_tax.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_pliant_shapes_layers"


def wrap_models(module: ModuleType) -> None:
    """Wrap the constructors of the model classes that a modeling file defines: those that take a config alone."""
    for name, model_class in list(vars(module).items()):
        own = isinstance(model_class, type) and model_class.__module__ == module.__name__
        whole = name.endswith("Model") or "For" in name
        if own and whole and "__init__" in vars(model_class) and not hasattr(model_class.__init__, _MARK):
            model_class.__init__ = _shaping(model_class.__init__, has_layers=name.endswith("Model"))


def _shaping(original: Callable[..., None], has_layers: bool) -> Callable[..., None]:
    """A constructor that cuts what ``original`` built to the shapes its config asks for.

    A record of shapes counts from the outermost model, so it is the one that first meets the config which sees it.
    """

    @functools.wraps(original)
    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        recorded = getattr(config, "pliant_shapes", None)
        if not recorded and not (has_layers and getattr(config, "is_heterogeneous", False)):
            return original(self, config, *args, **kwargs)
        from pliant.anatomy import plain_config
        from pliant.checkpoint.schema import shape_model

        plain = plain_config(config)
        original(self, plain, *args, **kwargs)
        vars(config).update(vars(plain))  # what a constructor settled, such as the attention implementation
        for module in self.modules():
            if getattr(module, "config", None) is plain:
                module.config = config  # later changes of the model's config must reach its layers
        return shape_model(self, config)

    setattr(construct, _MARK, True)
    return construct
