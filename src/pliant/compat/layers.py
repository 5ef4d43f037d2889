"""Rebuild per-layer shapes in ``AutoModelForCausalLM.from_pretrained``; ``import pliant`` is enough to enable it.

Since 5.14 transformers reads ``per_layer_config`` into its configs, but it refuses to build a model from pliant's
entries (checked: 5.14 to 5.24). Until it can, the constructors of a family's model classes are wrapped when its
modeling file is imported. The outermost one builds the full-size model from the dense config (on the meta device inside
``from_pretrained``) and then cuts it. For any other config the wrapper only calls the original, also for families that
transformers builds from per-layer entries of their own (Gemma 4). The official registry of replacement classes
(``transformers.monkey_patching``) would work for layers that know their index. But with anything registered, each load
of any model first walks every name of the package: 0.6 s, where loading a tiny model takes 0.03 s
(``benchmarks/load_tax.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_pliant_shapes_layers"


def wrap_models(module: ModuleType) -> None:
    """Wrap the constructors of a modeling file's model classes, and its auxiliary loss of experts."""
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
        from pliant.checkpoint.per_layer_config import as_transformers_alone, cuts_in, shape_model, uncut
        from pliant.elastic.ties import correct_ties

        if as_transformers_alone.get() or not (cuts := list(cuts_in(config))):
            return original(self, config, *args, **kwargs)
        dense, pairs = uncut(config)
        before = [dict(vars(plain)) for plain, _ in pairs]
        original(self, dense, *args, **kwargs)
        for (plain, own), known in zip(pairs, before, strict=True):
            # copy back the values that a constructor set, such as the attention implementation
            vars(own).update({key: value for key, value in vars(plain).items() if known.get(key, known) is not value})
        owns = {id(plain): own for plain, own in pairs}
        for module in self.modules():
            # later changes of the model's config must reach its layers; but modules with only values computed from a
            # config (rotary angles), which are recomputed when weights are loaded, keep the dense config
            computed = module._non_persistent_buffers_set and not module._parameters and not module._modules
            if id(getattr(module, "config", None)) in owns and not computed:
                module.config = owns[id(module.config)]
        for part in cuts:
            shape_model(self, part)
        correct_ties(self)
        if hasattr(self, "tie_weights"):
            self.tie_weights(recompute_mapping=False)  # tensors that several layers share were cut in each of them
        return None

    setattr(construct, _MARK, True)
    return construct


def _may_be_cut(config: Any) -> bool:
    """Whether a config, or one nested in it, has a shape record or per-layer entries; imports nothing."""
    if getattr(config, "pliant_shapes", None) or getattr(config, "is_heterogeneous", False):
        return True
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
    return any(part is not None and _may_be_cut(part) for part in parts)


def _balancing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The auxiliary loss of experts, for models whose layers have different numbers of experts.

    transformers concatenates the router logits of all layers. Here only those with the same number of experts are
    concatenated, and the losses are averaged over the layers. If all layers have the same number, the original is
    called.
    """

    import torch  # a modeling file with such a loss has imported it already

    @functools.wraps(original)
    def balance(gate_logits: Any, num_experts: Any = None, *args: Any, **kwargs: Any) -> Any:
        if gate_logits == ():  # every router was removed
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
