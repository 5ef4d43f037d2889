"""The anatomy of one model: its residual blocks, their axes and every tensor slice that hangs on an axis."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from pliant.anatomy.null import Null
from pliant.architecture import Architecture, BlockSpec, Part, architecture_of
from pliant.errors import ArchitectureError


@dataclass(frozen=True)
class Axis:
    """A dimension of one block that can shrink.

    Attributes:
        name: full name, e.g. ``layers.3.mlp.channels``.
        size: units there are now.
        unit: elements in one unit (1 for channels, ``head_dim`` for heads).
        leader: short name of the axis that decides; itself unless it follows another.
        ratio: units of this axis for one unit of the leader (query heads per key-value head).
        config_key: the config.json key that holds the size.
    """

    name: str
    size: int
    unit: int
    leader: str
    ratio: int
    config_key: str


@dataclass(frozen=True)
class Weight:
    """One parameter of a block and the axes its dimensions live on.

    Attributes:
        path: where it is inside the layer, e.g. ``self_attn.q_proj.weight``.
        dims: for each tensor dimension, the stretches it is made of, in order.
        reads: for the matrix of a linear layer, the tensor dimension that runs over its inputs; None for other tensors.
            A matrix costs one multiply-accumulate per element and token.
    """

    path: str
    dims: tuple[tuple[Part, ...], ...]
    reads: int | None = None


@dataclass(frozen=True)
class Attribute:
    """A plain attribute that must follow an axis: ``out_features`` of a linear layer, ``num_heads`` of an attention.

    Attributes:
        path: the module inside the layer; ``config.x`` as ``name`` means x of the config this module reads.
        parts: what it adds up to. ``in_units`` says whether that is counted in units or in elements.
    """

    path: str
    name: str
    parts: tuple[Part, ...]
    in_units: bool = False


@dataclass(frozen=True)
class Block:
    """One residual block, ``x + f(norm(x))``, that can be removed whole or made narrower.

    Attributes:
        name: full name, e.g. ``layers.3.attention``.
        layer: index of the layer it is in.
        axes: its axes by short name; only leaders can be chosen, the others follow.
        fixed: sizes of the dimensions that do not change.
        norm_parameters: parameters of the norms that disappear with the block.
    """

    name: str
    layer: int
    spec: BlockSpec
    axes: Mapping[str, Axis]
    fixed: Mapping[str, int]
    weights: tuple[Weight, ...]
    attributes: tuple[Attribute, ...]
    norm_parameters: int

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def leaders(self) -> tuple[Axis, ...]:
        """The axes that can be chosen."""
        return tuple(axis for short, axis in self.axes.items() if axis.leader == short)

    def units(self, part: Part, kept: Mapping[str, int]) -> int:
        """Units of ``part.axis`` when ``kept[leader]`` units are kept of each leader; leaders left out are full."""
        axis = self.axes[part.axis]
        return axis.ratio * kept.get(axis.leader, self.axes[axis.leader].size)

    def width(self, part: Part, kept: Mapping[str, int]) -> int:
        """Elements of a tensor dimension that ``part`` covers."""
        if part.axis in self.fixed:
            return self.fixed[part.axis] * part.factor
        return self.units(part, kept) * self.axes[part.axis].unit * part.factor

    def shape(self, weight: Weight, kept: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a parameter when ``kept`` units are kept."""
        return tuple(sum(self.width(part, kept) for part in dim) for dim in weight.dims)

    def parameters(self, kept: Mapping[str, int]) -> int:
        """Parameters of the block and its norms."""
        return self.norm_parameters + sum(prod(self.shape(weight, kept)) for weight in self.weights)


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        architecture: the architecture file it was read with.
        blocks: the blocks it has, by name, in the order in which they run. Removed blocks are not in it.
        depth: layers, counting those whose blocks are all gone.
        layer_types: the attention type of each layer (``full_attention``, ``sliding_attention``).
        rest: parameters outside every block: embeddings, output head, final norm.
        head: multiply-accumulates per token of the output head.
    """

    architecture: Architecture
    blocks: Mapping[str, Block]
    depth: int
    layer_types: tuple[str, ...]
    rest: int
    head: int

    @property
    def axes(self) -> dict[str, Axis]:
        """Every axis that can be chosen, by full name."""
        return {axis.name: axis for block in self.blocks.values() for axis in block.leaders}


def layers_of(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """The list of layers of a model, with or without a head on top of it."""
    paths = (architecture.layers, architecture.layers.partition(".")[2])
    for path in paths:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise ArchitectureError(
        f"{type(model).__name__} has no list of layers at {paths[0]!r}, where {architecture.name}.yaml says it is"
    )


def plain_config(config: Any) -> Any:
    """A copy of a config without its per-layer part, so that every key can be read."""
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


def global_size(config: Any, size: int | str) -> int:
    """What a size in an architecture file comes to: a number, or config keys as ``a``, ``a * b``, ``a // b``, ``a or b``.

    Arguments:
        config: a config without per-layer part.
    """
    if isinstance(size, int):
        return size
    for alternative in size.split(" or "):
        first, *rest = alternative.split()
        value = _term(config, first)
        for operator, operand in zip(rest[::2], rest[1::2], strict=True):
            other = _term(config, operand)
            if value is not None and other is not None:
                value = value * other if operator == "*" else value // other
        if value is not None:
            return value
    raise ArchitectureError(f"the config of this {config.model_type} model gives no whole number for {size!r}")


def _term(config: Any, text: str) -> int | None:
    value = int(text) if text.isdigit() else getattr(config, text, None)
    return value if isinstance(value, int) else None


def anatomy_of(model: Any) -> Anatomy:
    """Read the anatomy of a transformers model, dense or already pruned, and check it against the tensors.

    Raises:
        ArchitectureError: unknown architecture, or a tensor whose shape or presence the file does not explain.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) is None:
        raise ArchitectureError(
            f"{type(model).__name__} is not a transformers model: it has no config with a model_type"
        )
    text_config = config.get_text_config(decoder=True)
    architecture = architecture_of(text_config.model_type)
    plain = plain_config(text_config)
    layers = layers_of(model, architecture)
    blocks = {b.name: b for i, layer in enumerate(layers) for b in blocks_of(layer, i, architecture, plain)}
    total = sum(parameter.numel() for parameter in model.parameters())  # tied parameters come once
    inside = sum(block.parameters({}) for block in blocks.values())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return Anatomy(
        architecture=architecture,
        blocks=blocks,
        depth=len(layers),
        layer_types=tuple(getattr(plain, "layer_types", None) or ("full_attention",) * len(layers)),
        rest=total - inside,
        head=0 if head is None else head.weight.numel(),
    )


def blocks_of(layer: nn.Module, index: int, architecture: Architecture, plain: Any) -> list[Block]:
    """The blocks that one layer has.

    Arguments:
        plain: the model's config without per-layer part.
    """
    blocks = (_read_block(layer, spec, architecture, plain, index) for spec in architecture.blocks)
    return [block for block in blocks if block is not None]


def _read_block(layer: nn.Module, spec: BlockSpec, architecture: Architecture, plain: Any, index: int) -> Block | None:
    """One block of one layer, or None when it was removed."""
    name = f"layers.{index}.{spec.kind}"
    module = layer.get_submodule(spec.module)
    if isinstance(module, Null):
        return None
    weights, attributes = [], []
    for child, dims in spec.weights.items():
        target = module.get_submodule(child) if _has_module(module, child) else None
        if target is None:
            raise ArchitectureError(f"{name} has no {child!r}, which {architecture.name}.yaml lists")
        path = f"{spec.module}.{child}"
        if isinstance(target, Conv1D):  # a linear layer that is stored (in, out)
            weights.append(Weight(f"{path}.weight", dims[::-1], reads=0))
            attributes += [Attribute(path, "nf", dims[0]), Attribute(path, "nx", dims[1])]
        elif isinstance(target, nn.Linear):
            weights.append(Weight(f"{path}.weight", dims, reads=1))
            attributes += [Attribute(path, "out_features", dims[0]), Attribute(path, "in_features", dims[1])]
        else:
            weights.append(Weight(f"{path}.weight", dims))
        if getattr(target, "bias", None) is not None:
            weights.append(Weight(f"{path}.bias", dims[:1]))
    for key, value in (spec.attributes or {}).items():
        axis = value.removesuffix(".width")
        attributes.append(Attribute(spec.module, key, (Part(axis),), in_units=axis == value))

    fixed = {axis: global_size(plain, key) for axis, key in architecture.fixed.items()}
    axes = _read_axes(layer, spec, architecture, plain, name, weights, fixed)
    norms = sum(parameter.numel() for norm in spec.norms for parameter in layer.get_submodule(norm).parameters())
    block = Block(name, index, spec, axes, fixed, tuple(weights), tuple(attributes), norms)

    listed = {weight.path: weight for weight in weights}
    for path, parameter in module.named_parameters(prefix=spec.module):
        if path not in listed:
            raise ArchitectureError(f"{name} holds {path!r}, which {architecture.name}.yaml does not list")
        expected = block.shape(listed[path], {})
        if tuple(parameter.shape) != expected:
            raise ArchitectureError(
                f"{name}: {path} has shape {tuple(parameter.shape)}, {architecture.name}.yaml gives {expected}"
            )
    return block


def _read_axes(
    layer: nn.Module,
    spec: BlockSpec,
    architecture: Architecture,
    plain: Any,
    name: str,
    weights: list[Weight],
    fixed: Mapping[str, int],
) -> dict[str, Axis]:
    """Sizes of a block's axes, from the tensors themselves: a pruned model differs from layer to layer."""
    axes: dict[str, Axis] = {}
    for leader in architecture.leaders(spec):
        family = [leader, *(n for n, a in architecture.axes.items() if a.follows == leader)]
        sizes = {member: global_size(plain, architecture.axes[member].size) for member in family}
        units = {member: architecture.axes[member].unit for member in family}
        wide = {member: global_size(plain, unit) for member, unit in units.items()}
        ratios = {member: sizes[member] // sizes[leader] for member in family}
        # the width of the first dimension made of this family alone gives the number of units now
        for weight in weights:
            for position, dim in enumerate(weight.dims):
                if all(part.axis in family for part in dim):
                    per_unit = sum(ratios[part.axis] * wide[part.axis] * part.factor for part in dim)
                    size, left = divmod(layer.get_parameter(weight.path).shape[position], per_unit)
                    if left or not size:
                        raise ArchitectureError(
                            f"{name}: dimension {position} of {weight.path} is not a multiple of {per_unit}, the width "
                            f"of one unit of {leader!r}"
                        )
                    break
            else:
                continue
            break
        else:
            raise ArchitectureError(f"{name}: no dimension of any weight shows the size of axis {leader!r} alone")
        for member in family:
            axes[member] = Axis(
                name=f"{name}.{member}",
                size=ratios[member] * size,
                unit=wide[member],
                leader=leader,
                ratio=ratios[member],
                config_key=architecture.axes[member].config_key,
            )
    overlap = set(axes) & set(fixed)
    if overlap:
        raise ArchitectureError(f"{name}: {sorted(overlap)} are declared both as axes and as fixed")
    return axes


def _has_module(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
