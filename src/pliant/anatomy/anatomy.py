"""The anatomy of one model: the residual blocks it is made of, read from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pliant.anatomy.block import Attribute, Axis, Block, Weight
from pliant.anatomy.config import global_size, guards, layer_config, plain_config, text_config_of
from pliant.anatomy.null import Null
from pliant.architecture import Architecture, BlockSpec, Part, architecture_of, catalogue, parse
from pliant.errors import ArchitectureError
from pliant.runtime.packed_linear import Packed


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
    def traced(self) -> bool:
        """Whether it was read from the operations of the model, not with an architecture file."""
        return self.architecture.layers == "."

    @property
    def axes(self) -> dict[str, Axis]:
        """Every axis that can be chosen, by full name. Several blocks may share one; it is then named within none of them
        that can be removed."""
        return {axis.name: axis for block in self.blocks.values() for axis in block.leaders}


def layers_of(model: nn.Module, architecture: Architecture, config: Any = None) -> nn.ModuleList:
    """The list of layers of a model, with or without a head on top of it, or of the text decoder inside a model. The path ``.``
    means the model itself.

    Arguments:
        config: the part of the model's config that describes the layers; default: that of its text decoder.

    Raises:
        ArchitectureError: the model has no list of layers at the path in the architecture file.
    """
    if architecture.layers == ".":
        return nn.ModuleList([model])
    whole = architecture.layers.split(" or ")
    for holder in holders_of(model, config):
        for path in whole:
            names = path.split(".")
            for start in range(len(names)):  # from inside the model the path is shorter
                found = _find(holder, ".".join(names[start:]))
                if isinstance(found, nn.ModuleList):
                    return found
    raise ArchitectureError(
        f"{type(model).__name__} has no list of layers at {whole[0]!r}, where {architecture.name}.yaml says it is"
    )


def holders_of(model: nn.Module, config: Any = None) -> list[nn.Module]:
    """The modules in which to look for the layers that a config describes: the whole model, or, in a multimodal model, the modules
    built from that config, because other parts may have layers at the same path.

    Arguments:
        config: see :func:`layers_of`.
    """
    own: Any = getattr(model, "config", None)
    if config is None and isinstance(own, PreTrainedConfig):
        config = own.get_text_config(decoder=True)
    if config is None or config is own or type(config) is type(own):
        return [model]
    readers: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    same = [module for module in readers if module.config is config]
    return same or [module for module in readers if isinstance(module.config, type(config))]


def anatomy_of(model: Any, *, example: Any = None) -> Anatomy:
    """Read the anatomy of a model, dense or already pruned, and check it against the tensors.

    A model with an architecture file is read with that. A convolutional network needs none: it is traced.

    Arguments:
        example: what a model that is traced runs on, if not one image of the size its config names (224 x 224 where it names
            none): a tensor, a sequence of them, or a mapping from names to them. It is remembered for this model.

    Raises:
        ArchitectureError: unknown architecture, a tensor whose shape or presence the file does not explain, or a model that
            cannot be traced.
    """
    from pliant.anatomy.trace import traceable, traced

    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    described = model_type in catalogue() or getattr(config, "pliant_architecture", None)
    image = getattr(model, "main_input_name", "pixel_values") == "pixel_values"  # plain modules do not say
    if not described and traceable(model) and (image or example is not None):
        return traced(model, example)
    if model_type is None:
        raise ArchitectureError(
            f"{type(model).__name__} is not a transformers model, it has no config with a model_type; nor has it convolutions "
            "to trace"
        )
    architecture = described_by(config.get_text_config(decoder=True))
    text_config = text_config_of(config)
    plain = plain_config(text_config)
    layers = layers_of(model, architecture)
    for spec in architecture.blocks:
        guards(spec, architecture, layer_config(plain, 0))  # raises now, before anything is cut
    blocks = {b.name: b for i, layer in enumerate(layers) for b in blocks_of(layer, i, architecture, plain)}
    total = sum(parameter.numel() for parameter in model.parameters())  # tied parameters come once
    total += sum(module.parameters_held() for module in model.modules() if isinstance(module, Packed))
    inside = sum(block.parameters({}) for block in blocks.values())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return Anatomy(
        architecture=architecture,
        blocks=blocks,
        depth=len(layers),
        layer_types=tuple(getattr(plain, "layer_types", None) or ("full_attention",) * len(layers)),
        rest=total - inside,
        head=0 if head is None else Weight("weight", ()).tensor(head).numel(),
    )


def described_by(config: Any) -> Architecture:
    """The architecture of a model: the one its config carries, else the one known for its ``model_type``.

    Raises:
        ArchitectureError: when there is neither.
    """
    carried = getattr(config, "pliant_architecture", None)
    return parse(config.model_type, carried) if carried else architecture_of(config.model_type)


def blocks_of(layer: nn.Module, index: int, architecture: Architecture, plain: Any) -> list[Block]:
    """The blocks that one layer has.

    Arguments:
        plain: the dense model's config.
    """
    known = {m for spec in architecture.blocks for n in (*spec.modules, *spec.norms) for m in n.split(" or ")}
    for path, _ in layer.named_parameters():
        if not any(path.startswith(f"{module}.") for module in known):
            raise ArchitectureError(f"layer {index} holds {path!r}, which is in no block of {architecture.name}.yaml")
    own = layer_config(plain, index)
    blocks = (_read_block(layer, spec, architecture, own, index) for spec in architecture.blocks)
    return [block for block in blocks if block is not None]


def _read_block(layer: nn.Module, spec: BlockSpec, architecture: Architecture, plain: Any, index: int) -> Block | None:
    """One block of one layer, or None when it was removed."""
    name, file = f"layers.{index}.{spec.kind}", f"{architecture.name}.yaml"
    for module in spec.modules:
        if _find(layer, module) is None:
            raise ArchitectureError(f"layer {index} has no {module!r}, which {file} lists")
    if isinstance(layer.get_submodule(spec.module), Null):
        return None
    fixed = {axis: global_size(plain, key) for axis, key in architecture.fixed.items()}
    weights, attributes = [], []
    for child, dims in spec.weights.items():
        path = spec.prefix + child
        target = _find(layer, path)
        if target is None and child in spec.optional:
            continue
        if target is None:
            raise ArchitectureError(f"{name} has no {child!r}, which {file} lists")
        matrix = target if isinstance(target, nn.Parameter) else Weight("weight", ()).tensor(target)
        if dims is None:  # never cut: its dimensions are what they are
            fixed |= {f"{child}.{place}": size for place, size in enumerate(matrix.shape)}
            dims = tuple((Part(f"{child}.{place}"),) for place in range(matrix.dim()))
        if isinstance(target, nn.Parameter):
            weights.append(Weight(path, dims, reads=len(dims) - 1 if len(dims) > 1 else None))
            continue
        if isinstance(target, Conv1D):  # a linear layer that is stored (in, out)
            weights.append(Weight(f"{path}.weight", dims[::-1], reads=0))
            attributes += [Attribute(path, "nf", dims[0]), Attribute(path, "nx", dims[1])]
        elif isinstance(target, nn.Linear | Packed):
            weights.append(Weight(f"{path}.weight", dims, reads=1))
            attributes += [Attribute(path, "out_features", dims[0]), Attribute(path, "in_features", dims[1])]
        else:
            weights.append(Weight(f"{path}.weight", dims))
        if getattr(target, "bias", None) is not None:
            weights.append(Weight(f"{path}.bias", dims[:1]))
    for key, value in (spec.attributes or {}).items():
        axis = value.removesuffix(".width")
        owner, _, attribute = key.rpartition(".") if not key.startswith("config.") else ("", "", key)
        path = spec.prefix + owner if owner else spec.module
        attributes.append(Attribute(path, attribute, (Part(axis),), in_units=axis == value))

    axes = _read_axes(layer, spec, architecture, plain, name, weights, fixed)
    listed_by = [_norms(layer, other) for other in architecture.blocks]
    own = [norm for norm in _norms(layer, spec) if sum(norm in norms for norms in listed_by) == 1]
    norm_parameters = sum(p.numel() for norm in own for p in layer.get_submodule(norm).parameters())
    removed = (*spec.modules[:-1], *own)
    cached = next((global_size(plain, n) for key, n in (spec.cached or {}).items() if getattr(plain, key, None)), None)
    block = Block(
        name, index, spec, axes, fixed, tuple(weights), tuple(attributes), removed, norm_parameters, cached=cached
    )

    listed = {weight.path: weight for weight in weights}
    for module in spec.modules:
        for path, parameter in layer.get_submodule(module).named_parameters(prefix=module):
            if path not in listed:
                raise ArchitectureError(f"{name} holds {path!r}, which {file} does not list")
            expected = block.shape(listed[path], {})
            if tuple(parameter.shape) != expected:
                raise ArchitectureError(f"{name}: {path} has shape {tuple(parameter.shape)}, {file} gives {expected}")
    return block


def _norms(layer: nn.Module, spec: BlockSpec) -> list[str]:
    """The norms of a block that this layer has: the first of each ``a or b``.

    Raises:
        ArchitectureError: when it has none of them.
    """
    found = []
    for listed in spec.norms:
        there = [norm for norm in listed.split(" or ") if _find(layer, norm) is not None]
        if not there:
            raise ArchitectureError(f"{type(layer).__name__} has no norm {listed!r}, which is listed for {spec.kind}")
        found.append(there[0])
    return found


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
                    size, left = divmod(weight.tensor(layer).shape[position], per_unit)
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
                cut=architecture.axes[leader].cut,
                active=_active(plain, architecture.axes[member].active),
                multiple=architecture.axes[leader].multiple,
            )
    overlap = set(axes) & set(fixed)
    if overlap:
        raise ArchitectureError(f"{name}: {sorted(overlap)} are declared both as axes and as fixed")
    return axes


def _active(plain: Any, key: str | None) -> int | None:
    return None if key is None else global_size(plain, key)


def _find(layer: nn.Module, path: str) -> Any:
    """The module or parameter at a path of a layer, None when there is none."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(layer.get_submodule(owner), name, None)
    except AttributeError:
        return None
