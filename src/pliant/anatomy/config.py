"""A model's config, seen without what pliant has cut: the dense model's, every size of which can be read."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from functools import cache
from types import ModuleType
from typing import Any

from pliant.architecture import Architecture, BlockSpec
from pliant.architecture.spec import factors
from pliant.errors import ArchitectureError

DENSE_LAYERS = "pliant_dense_layers"
"""The config key that says that pliant wrote ``per_layer_config``: the entries that the dense model had, mostly none."""


def is_cut(config: Any) -> bool:
    """Whether the per-layer part of a config says what pliant has cut.

    Some families have a per-layer part of their own, dense (Gemma 4). A config that pliant wrote bears its mark. Folders
    written by pliant 0.1.0 bear none; transformers built none of their families from a per-layer part then, so that a config
    without the mark is one of those unless transformers builds the family itself.
    """
    if not getattr(config, "is_heterogeneous", False):
        return False
    return DENSE_LAYERS in vars(config) or not builds_itself(type(config))


@cache
def builds_itself(config_class: type) -> bool:
    """Whether transformers builds a family's layers from ``per_layer_config``: its modeling file reads it."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        modeling: ModuleType = importlib.import_module(name)
        return "per_layer_config" in inspect.getsource(modeling)
    except (ImportError, OSError):
        return False


def plain_config(config: Any) -> Any:
    """A copy of a config without what says that a model was cut: that of the dense model.

    Every key can be read from it, unless the family has a per-layer part of its own: see :func:`layer_config`.
    """
    plain = copy.copy(config)
    if is_cut(config):
        plain.per_layer_config = None
        plain.per_layer_config = vars(config).get(DENSE_LAYERS) or None
    for key in (DENSE_LAYERS, "pliant_shapes"):
        vars(plain).pop(key, None)
    return plain


def entries_of(config: Any) -> dict[int, dict[str, Any]]:
    """What a config says layer by layer, as it is written."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(layer): dict(entry) for layer, entry in config.to_dict()["per_layer_config"].items()}


def layer_config(plain: Any, index: int) -> Any:
    """The config of one layer of the dense model, from which every key can be read."""
    return plain.per_layer_config[index] if getattr(plain, "is_heterogeneous", False) else plain


def text_config_of(config: Any) -> Any:
    """The config of the model's text decoder: itself, or the part of it that says so.

    Raises:
        ArchitectureError: the part is made anew whenever it is asked for (older encoder-decoders: BART, T5), so that nothing
            that is written into it would be saved.
    """
    found = config.get_text_config(decoder=True)
    if found is not config and config.get_text_config(decoder=True) is not found:
        raise ArchitectureError(
            f"the config of a {config.model_type} model has no part of its own for the decoder, so that a cut could not be "
            "written into it; encoder-decoders of this kind are not cut"
        )
    return found


def global_size(config: Any, size: int | str) -> int:
    """What a size in an architecture file comes to: a number, or config keys as ``a``, ``a * b``, ``a // b``, ``a + b``,
    ``a or b``. Products are taken before sums, each from left to right; of alternatives, the first that the config knows.

    Arguments:
        config: a config without per-layer part.

    Raises:
        ArchitectureError: none of the alternatives is a whole number, or the size is not written like that.
    """
    if isinstance(size, int):
        return size
    for alternative in size.split(" or "):
        sums = [_product(config, term) for term in factors(alternative)]
        if all(term is not None for term in sums):
            return sum(term for term in sums if term is not None)
    raise ArchitectureError(f"the config of this {config.model_type} model gives no whole number for {size!r}")


def _product(config: Any, term: list[str]) -> int | None:
    """``[a, "*", b, "//", c]`` from left to right; None when the config lacks one of them."""
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
    """What is written where a block is gone, so that transformers alone refuses: config keys and values.

    It reads ``skip`` nowhere and would build the block with random weights; a key with another value in one layer makes it
    refuse, as soon as it reads that key. The value is one that the layer can still be built with: the next float of the
    norm epsilon, or of the key that the architecture file names. A size becomes 0: of a named key, or, where the config has
    no norm epsilon, of the block's axes.

    Arguments:
        config: of the layer, dense.

    Raises:
        ArchitectureError: there is nothing to write, or the value would be the one that the dense model has.
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
                f"{where} has the guard {key!r}, which is {value!r} in this {config.model_type} model; a guard is a fraction, "
                "or a whole number other than 0: with any other value transformers alone would not notice that a block is gone"
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
    """What pliant may write, or may have written, into the entry of a layer besides ``skip``: sizes and guards."""
    sizes = {spec.config_key for spec in architecture.axes.values()}
    named = {spec.guard for spec in architecture.blocks}
    return {key for key in (*sizes, *named, *epsilons(config)) if key}
