"""``import pliant`` is all it takes for ``AutoModelForCausalLM.from_pretrained`` to rebuild per-layer shapes.

transformers reads ``per_layer_config`` into its configs since 5.14 and builds no model from what pliant writes there (checked:
5.14 to 5.24): it refuses such a config. Until it does, the constructors of a family's model classes are wrapped when its
modeling file is imported: the outermost one builds the model full-size (on no memory at all inside ``from_pretrained``) from
the dense model's config, in every part of it, and has it cut. For any other config the wrapper only calls the original; so it does for families that
transformers builds from a per-layer part of their own (Gemma 4). The official registry of stand-in classes
(``transformers.monkey_patching``) would do for layers that know their number, but with anything registered each load of any
model walks every name of the package first: 0.6 s, where loading a tiny model takes 0.03 s (``benchmarks/load_tax.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_pliant_shapes_layers"


def wrap_models(module: ModuleType) -> None:
    """Wrap the constructors of the model classes that a modeling file defines, those that take a config alone, and its
    auxiliary loss of experts."""
    for name, model_class in list(vars(module).items()):
        own = isinstance(model_class, type) and model_class.__module__ == module.__name__
        whole = name.endswith("Model") or "For" in name
        if own and whole and "__init__" in vars(model_class) and not hasattr(model_class.__init__, _MARK):
            model_class.__init__ = _shaping(model_class.__init__)
    balance = getattr(module, "load_balancing_loss_func", None)
    if balance is not None and "gate_logits" in balance.__code__.co_varnames and not hasattr(balance, _MARK):
        module.load_balancing_loss_func = _balancing(balance)  # pyright: ignore[reportAttributeAccessIssue]


def _shaping(original: Callable[..., None]) -> Callable[..., None]:
    """A constructor that cuts what ``original`` built to the shapes its config asks for."""

    @functools.wraps(original)
    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if not _may_be_cut(config):
            return original(self, config, *args, **kwargs)
        from pliant.checkpoint.schema import as_transformers_alone, cuts_in, shape_model, uncut

        if as_transformers_alone.get() or not (cuts := list(cuts_in(config))):
            return original(self, config, *args, **kwargs)
        dense, pairs = uncut(config)
        before = [dict(vars(plain)) for plain, _ in pairs]
        original(self, dense, *args, **kwargs)
        for (plain, own), known in zip(
            pairs, before, strict=True
        ):  # what a constructor settled: the attention implementation
            vars(own).update({key: value for key, value in vars(plain).items() if known.get(key, known) is not value})
        owns = {id(plain): own for plain, own in pairs}
        for module in self.modules():
            # later changes of the model's config must reach its layers; but what is only computed from a config (the angles of
            # rotary positions), and computed again when weights are loaded, is that of the dense model
            computed = module._non_persistent_buffers_set and not module._parameters and not module._modules
            if id(getattr(module, "config", None)) in owns and not computed:
                module.config = owns[id(module.config)]
        for part in cuts:
            shape_model(self, part)
        return None

    setattr(construct, _MARK, True)
    return construct


def _may_be_cut(config: Any) -> bool:
    """Whether a config, or a part of it, has a record of shapes or a per-layer part; to find that out, nothing is imported."""
    if getattr(config, "pliant_shapes", None) or getattr(config, "is_heterogeneous", False):
        return True
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
    return any(part is not None and _may_be_cut(part) for part in parts)


def _balancing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The auxiliary loss of experts, for layers that have lost some of theirs.

    transformers puts the routers of all layers into one tensor. Here those with as many experts are; of the losses of such
    groups, the mean over layers is taken. With experts alike in all layers it is the original, for their number.
    """

    import torch  # whoever has such a loss has imported it

    @functools.wraps(original)
    def balance(gate_logits: Any, num_experts: Any = None, *args: Any, **kwargs: Any) -> Any:
        if gate_logits == ():  # every router is gone
            return torch.zeros(())
        if not isinstance(gate_logits, tuple) or all(logits.shape[-1] == num_experts for logits in gate_logits):
            return original(gate_logits, num_experts, *args, **kwargs)
        by_experts: dict[int, list[Any]] = {}
        for logits in gate_logits:
            by_experts.setdefault(logits.shape[-1], []).append(logits)
        losses = [len(same) * original(tuple(same), number, *args, **kwargs) for number, same in by_experts.items()]
        return sum(losses) / len(gate_logits)

    setattr(balance, _MARK, True)
    return balance
