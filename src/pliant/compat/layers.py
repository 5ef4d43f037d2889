"""``import pliant`` is all it takes for ``AutoModelForCausalLM.from_pretrained`` to rebuild per-layer shapes.

transformers reads ``per_layer_config`` into its configs since 5.14 and builds no model from what pliant writes there (checked:
5.14 to 5.24): it refuses such a config. Until it does, the constructors of a family's model classes are wrapped when its
modeling file is imported: the one that makes the list of layers builds it full-size (on no memory at all inside
``from_pretrained``) and has it cut. For any other config the wrapper only calls the original; so it does for families that
transformers builds from a per-layer part of their own (Gemma 4). The official registry of stand-in classes
(``transformers.monkey_patching``) would do for layers that know their number, but with anything registered each load of any
model walks every name of the package first: 0.6 s, where loading a tiny model takes 0.03 s (``benchmarks/load_tax.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

_MARK = "_pliant_shapes_layers"
_cuts_made: ContextVar[list[Any] | None] = ContextVar("cuts_made", default=None)
"""Inside a constructor: the configs whose cuts were made so far."""


def wrap_models(module: ModuleType) -> None:
    """Wrap the constructors of the model classes that a modeling file defines: those that take a config alone."""
    for name, model_class in list(vars(module).items()):
        own = isinstance(model_class, type) and model_class.__module__ == module.__name__
        whole = name.endswith("Model") or "For" in name
        if own and whole and "__init__" in vars(model_class) and not hasattr(model_class.__init__, _MARK):
            model_class.__init__ = _shaping(model_class.__init__, has_layers=name.endswith("Model"))
    balance = getattr(module, "load_balancing_loss_func", None)
    if balance is not None and "gate_logits" in balance.__code__.co_varnames and not hasattr(balance, _MARK):
        module.load_balancing_loss_func = _balancing(balance)  # pyright: ignore[reportAttributeAccessIssue]


def _shaping(original: Callable[..., None], has_layers: bool) -> Callable[..., None]:
    """A constructor that cuts what ``original`` built to the shapes its config asks for.

    A record of shapes counts from the outermost model, so it is the one that first meets the config which sees it. The
    outermost constructor also proves that every cut that its config asks for, in whatever part, was made.
    """

    @functools.wraps(original)
    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        made = _cuts_made.get()
        token = _cuts_made.set([]) if made is None else None
        try:
            _construct(original, has_layers, self, config, *args, **kwargs)
            if token is not None and _asks(config):
                _prove_made(self, config)
        finally:
            if token is not None:
                _cuts_made.reset(token)

    setattr(construct, _MARK, True)
    return construct


def _construct(original: Callable[..., None], has_layers: bool, self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    if not getattr(config, "pliant_shapes", None) and not (has_layers and getattr(config, "is_heterogeneous", False)):
        return original(self, config, *args, **kwargs)
    from pliant.anatomy import is_cut, plain_config
    from pliant.checkpoint.schema import as_transformers_alone, shape_model

    if as_transformers_alone.get() or not (getattr(config, "pliant_shapes", None) or is_cut(config)):
        return original(self, config, *args, **kwargs)
    plain = plain_config(config)
    before = dict(vars(plain))
    original(self, plain, *args, **kwargs)
    settled = {key: value for key, value in vars(plain).items() if key not in before or before[key] is not value}
    vars(config).update(settled)  # such as the attention implementation
    for module in self.modules():
        # later changes of the model's config must reach its layers; but what is computed from a config (the angles of rotary
        # positions), and computed again when weights are loaded, is that of the dense model
        if getattr(module, "config", None) is plain and not module._non_persistent_buffers_set:
            module.config = config
    shape_model(self, config)
    made = _cuts_made.get()
    if made is not None:
        made.append(config)


def _asks(config: Any) -> bool:
    """Whether any part of a config has a per-layer part, without importing more than there is."""
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
    return getattr(config, "is_heterogeneous", False) or any(part is not None and _asks(part) for part in parts)


def _prove_made(model: Any, config: Any) -> None:
    """Raises:
    ArtefactError: a cut that a config asks for was not made: these layers would be whole, and random.
    """
    from pliant.anatomy import entries_of
    from pliant.checkpoint.schema import as_transformers_alone, cuts_in
    from pliant.errors import ArtefactError

    if as_transformers_alone.get():
        return
    made = [(type(one), entries_of(one)) for one in _cuts_made.get() or ()]  # a model may have been given a copy
    for part in cuts_in(config):
        if (type(part), entries_of(part)) not in made:
            raise ArtefactError(
                f"the {part.model_type} layers of this model were cut, and {type(model).__name__} has no such layers, or none that "
                "pliant could find; load it with the class that it was saved from"
            )


def _balancing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The auxiliary loss of experts, for layers that have lost some of theirs.

    transformers puts the routers of all layers into one tensor. Here those with as many experts are; of the losses of such
    groups, the mean over layers is taken. With experts alike in all layers it is the original, for their number.
    """

    @functools.wraps(original)
    def balance(gate_logits: Any, num_experts: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(gate_logits, tuple) or all(logits.shape[-1] == num_experts for logits in gate_logits):
            return original(gate_logits, num_experts, *args, **kwargs)
        by_experts: dict[int, list[Any]] = {}
        for logits in gate_logits:
            by_experts.setdefault(logits.shape[-1], []).append(logits)
        losses = [len(same) * original(tuple(same), number, *args, **kwargs) for number, same in by_experts.items()]
        return sum(losses) / len(gate_logits)

    setattr(balance, _MARK, True)
    return balance
