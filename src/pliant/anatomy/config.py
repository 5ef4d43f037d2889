"""Read the dense model's config from a cut model's config, and compute sizes and guards from it."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Iterable
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig

from pliant.architecture import Architecture, BlockSpec
from pliant.architecture.format import factors
from pliant.errors import ArchitectureError

DENSE_LAYERS = "pliant_dense_layers"
"""The config key that marks ``per_layer_config`` as written by pliant. It holds the dense model's entries, mostly
none."""


def is_cut(config: Any) -> bool:
    """Whether a config's ``per_layer_config`` describes a cut by pliant.

    Some dense families use ``per_layer_config`` themselves (Gemma 4). A config that pliant wrote has the key
    ``DENSE_LAYERS``. Folders of pliant 0.1.0 lack it; at that time transformers built none of their families from
    ``per_layer_config``. So a config without the key is one of those, unless transformers builds the family from it.
    """
    if not getattr(config, "is_heterogeneous", False):
        return False
    return DENSE_LAYERS in vars(config) or not builds_itself(type(config))


@cache
def builds_itself(config_class: type) -> bool:
    """Whether transformers builds a family's layers from ``per_layer_config``, that is, its modeling file reads it."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        modeling: ModuleType = importlib.import_module(name)
        return "per_layer_config" in inspect.getsource(modeling)
    except (ImportError, OSError):
        return False


def plain_config(config: Any) -> Any:
    """A copy of a config without the entries that pliant wrote: the config of the dense model.

    Every key can be read from it, unless the family has per-layer entries of its own: see :func:`layer_config`.
    """
    plain = copy.copy(config)
    if is_cut(config):
        plain.per_layer_config = None
        plain.per_layer_config = vars(config).get(DENSE_LAYERS) or None
    for key in (DENSE_LAYERS, "pliant_shapes"):
        vars(plain).pop(key, None)
    return plain


def entries_of(config: Any) -> dict[int, dict[str, Any]]:
    """Layer index -> entry of a config's ``per_layer_config``, as written."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(layer): dict(entry) for layer, entry in config.to_dict()["per_layer_config"].items()}


def layer_config(plain: Any, index: int) -> Any:
    """The config of one layer of the dense model, from which every key can be read."""
    return plain.per_layer_config[index] if getattr(plain, "is_heterogeneous", False) else plain


def layer_types_of(plain: Any, depth: int) -> tuple[str, ...]:
    """The type of each layer; ``full_attention`` if the config has none.

    Arguments:
        plain: the dense model's config.
    """
    return tuple(getattr(plain, "layer_types", None) or ("full_attention",) * depth)


def config_of(model: Any) -> Any:
    """The config of a model; for a plain module the attributes of its ``config``, if it has one, with the name of its
    class as ``model_type``, unless they have one."""
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        return config
    keys = {"model_type": type(model).__name__, **getattr(config, "__dict__", {})}
    return SimpleNamespace(**keys)


def text_config_of(config: Any) -> Any:
    """The config of the model's text decoder: the config itself, or one nested in it.

    Raises:
        ArchitectureError: the config creates the nested one at every access (older encoder-decoders: BART, T5), so that
            changes to it would not be saved.
    """
    text_config = config.get_text_config(decoder=True)
    if text_config is not config and config.get_text_config(decoder=True) is not text_config:
        raise ArchitectureError(
            f"the config of a {config.model_type} model has no separate decoder config, so a cut could not be "
            "recorded; encoder-decoder models of this kind cannot be cut"
        )
    return text_config


def global_size(config: Any, size: int | str) -> int:
    """Evaluate a size in an architecture file: a number, or config keys as ``a``, ``a * b``, ``a // b``, ``a + b``, ``a
    or b``.

    Products are evaluated before sums, each from left to right; of alternatives, the first that the config defines is
    taken.

    Arguments:
        config: a config without per-layer entries.

    Raises:
        ArchitectureError: no alternative is an int, or the size is malformed.
    """
    if isinstance(size, int):
        return size
    for alternative in size.split(" or "):
        sums = [_product(config, term) for term in factors(alternative)]
        if all(term is not None for term in sums):
            return sum(term for term in sums if term is not None)
    raise ArchitectureError(f"the config of this {config.model_type} model gives no whole number for {size!r}")


def _product(config: Any, term: list[str]) -> int | None:
    """Evaluate ``[a, "*", b, "//", c]`` from left to right; None if the config lacks one of the keys."""
    value = _number(config, term[0])
    for operator, operand in zip(term[1::2], term[2::2], strict=True):
        other = _number(config, operand)
        if value is None or other is None:
            return None
        value = value * other if operator == "*" else value // other
    return value


def _number(config: Any, text: str) -> int | None:
    value = int(text) if text.isdigit() else getattr(config, text, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def guards(spec: BlockSpec, architecture: Architecture, config: Any) -> dict[str, float | int]:
    """The config keys and values written where a block is removed, so that transformers without pliant refuses the
    config.

    transformers ignores ``skip`` and would build the block with random weights; but it refuses as soon as it reads a
    key whose value differs in one layer. The written value is the next float of the norm epsilon, or of the key that
    the architecture file names, so that the layer can still be built from it. Sizes are written as 0: that of a named
    key, or, if the config has no norm epsilon, those of the block's axes.

    Arguments:
        config: the dense config of the layer.

    Raises:
        ArchitectureError: the config has no such key, or the written value would equal the dense model's.
    """
    where = f"block {spec.kind!r} of {architecture.name}.yaml"
    keys = (spec.guard,) if spec.guard else epsilons(config)
    if not keys:
        sizes = {architecture.axes[leader].config_key for leader in architecture.leaders(spec)}
        keys = tuple(sorted(key for key in sizes if key))
    if not keys:
        raise ArchitectureError(
            f"{where} needs 'guard': none of its axes has a config key of its own, and the config of this "
            f"{config.model_type} model has no norm epsilon"
        )
    written: dict[str, float | int] = {}
    for key in keys:
        value = getattr(config, key, None)
        other = math.nextafter(value, math.inf) if isinstance(value, float) else 0
        if isinstance(value, bool) or not isinstance(value, float | int) or not abs(other - value) > 0:
            raise ArchitectureError(
                f"{where} has the guard {key!r}, which is {value!r} in this {config.model_type} model; a guard must "
                "be a float or a nonzero int, or transformers without pliant would not notice that a block was "
                "removed. Name another key"
            )
        written[key] = other
    return written


def epsilons(config: Any) -> tuple[str, ...]:
    """The keys of a config that hold a norm epsilon."""
    return tuple(
        key
        for key, value in vars(config).items()
        if "norm" in key and key.endswith(("eps", "epsilon")) and isinstance(value, float)
    )


def known_keys(architecture: Architecture, config: Any) -> set[str]:
    """The keys besides ``skip`` that pliant writes into a layer's entry: sizes and guards."""
    sizes = {spec.config_key for spec in architecture.axes.values()}
    return {key for key in sizes if key} | guard_keys(architecture.blocks, config)


def guard_keys(blocks: Iterable[BlockSpec], config: Any) -> set[str]:
    """The keys that are guards where these blocks are removed, besides sizes."""
    return {key for spec in blocks for key in ((spec.guard,) if spec.guard else epsilons(config))}


def is_guard(value: Any, dense: Any) -> bool:
    """Whether a value in a layer's entry is a guard: the next float of the dense model's value, or the 0 of pliant
    0.1.0."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        return False
    return value == 0 or (isinstance(dense, float) and value == math.nextafter(dense, math.inf))
