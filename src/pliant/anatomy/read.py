"""Read the anatomy of a model from its tensors, with an architecture file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pliant.anatomy.anatomy import Anatomy, Traced, counted_once
from pliant.anatomy.block import Attribute, Block, Weight
from pliant.anatomy.config import (
    config_of,
    global_size,
    guards,
    layer_config,
    layer_types_of,
    plain_config,
    text_config_of,
)
from pliant.anatomy.null import Null
from pliant.anatomy.probe import remember
from pliant.anatomy.read_axes import read_axes
from pliant.anatomy.tie import tie
from pliant.architecture import Architecture, BlockSpec, Part, architecture_of, catalogue, parse
from pliant.errors import ArchitectureError
from pliant.runtime.dense import is_linear, size_names, stored_in_out
from pliant.runtime.packed_linear import Packed


def layers_of(model: nn.Module, source: Architecture | Traced, config: Any = None) -> nn.ModuleList:
    """The list of layers of a model, with or without a head, or of the text decoder inside it; a traced model is one
    layer.

    Arguments:
        config: the part of the model's config that describes the layers; default: that of its text decoder.

    Raises:
        ArchitectureError: the model has no list of layers at the path in the architecture file.
    """
    if isinstance(source, Traced):
        return nn.ModuleList([model])
    whole = source.layers.split(" or ")
    for holder in holders_of(model, config):
        for path in whole:
            names = path.split(".")
            for start in range(len(names)):  # from inside the model the path is shorter
                layers = _find(holder, ".".join(names[start:]))
                if isinstance(layers, nn.ModuleList):
                    return layers
    raise ArchitectureError(
        f"{type(model).__name__} has no list of layers at {whole[0]!r}, where {source.name}.yaml says it is"
    )


def holders_of(model: nn.Module, config: Any = None) -> list[nn.Module]:
    """The modules that may hold the layers that a config describes.

    That is the whole model. In a multimodal model it is the modules built from that config, because other parts may
    have layers at the same path.

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

    A model with an architecture file is read with it; a plain module, without a transformers config, with the file that
    lists the name of its class. A convolutional network without a file is traced.

    Arguments:
        example: an input: a tensor, a sequence of tensors, or a mapping from names to tensors. It is remembered for
            this model, to trace and check it. Default: random tokens, or one image of the size in the config, or of
            224 x 224.

    Raises:
        ArchitectureError: the architecture is unknown, the file does not explain the shape or presence of a tensor, or
            the model cannot be traced.
    """
    from pliant.anatomy.trace import traceable, traced

    config: Any = config_of(model)
    described = config.model_type in catalogue() or getattr(config, "pliant_architecture", None)
    image = getattr(model, "main_input_name", "pixel_values") == "pixel_values"  # plain modules do not say
    if not described and traceable(model) and (image or example is not None):
        return traced(model, example)
    own = isinstance(config, PreTrainedConfig)
    text_config = config.get_text_config(decoder=True) if own else config
    if not own and not described:
        raise ArchitectureError(
            f"{type(model).__name__} cannot be read: it has no config with a model_type, as transformers models have, "
            f"no architecture file that lists {config.model_type!r} under 'models', and no convolutions to trace"
        )
    if example is not None:
        remember(model, example)
    architecture = described_by(text_config)
    plain = plain_config(text_config_of(config) if own else config)
    layers = layers_of(model, architecture)
    for spec in architecture.blocks if own else ():
        guards(spec, architecture, layer_config(plain, 0))  # raises now, before anything is cut
    types = layer_types_of(plain, len(layers))
    blocks = {b.name: b for i, layer in enumerate(layers) for b in blocks_of(layer, i, architecture, plain, types[i])}
    blocks = tie(blocks, layers)
    total = sum(parameter.numel() for parameter in model.parameters())  # tied parameters come once
    total += sum(module.parameters_held() for module in model.modules() if isinstance(module, Packed))
    inside = sum(block.parameters({}, tied=first) for block, first in counted_once(blocks.values()))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return Anatomy(
        source=architecture,
        blocks=blocks,
        depth=len(layers),
        layer_types=types,
        rest=total - inside,
        head=0 if head is None else Weight("weight", ()).tensor(head).numel(),
    )


def described_by(config: Any) -> Architecture:
    """The architecture for a config: the one that it carries, else the one known for its ``model_type``; without the
    blocks that this model does not have.

    Raises:
        ArchitectureError: neither exists.
    """
    carried = getattr(config, "pliant_architecture", None)
    architecture = parse(config.model_type, carried) if carried else architecture_of(config.model_type)
    return architecture.of(plain_config(config))


def blocks_of(layer: nn.Module, index: int, architecture: Architecture, plain: Any, layer_type: str) -> list[Block]:
    """The blocks that one layer has.

    Arguments:
        plain: the dense model's config.
    """
    specs = architecture.blocks_of(layer_type)
    listed = {n for spec in specs for layout in spec.layouts for n in (*layout.modules, *layout.norms)}
    known = {module for names in listed for module in names.split(" or ")}
    for path, _ in layer.named_parameters():
        if not any(path.startswith(f"{module}.") for module in known):
            raise ArchitectureError(f"layer {index} holds {path!r}, which is in no block of {architecture.name}.yaml")
    own = layer_config(plain, index)
    earlier = [architecture.blocks_of(layer_type) for layer_type in layer_types_of(plain, index)[:index]]
    positions = [sum(spec in of_layer for of_layer in earlier) for spec in specs]
    layouts = [_layout(layer, *of_spec, architecture, index) for of_spec in zip(specs, positions, strict=True)]
    norms = [_norms(layer, layout or spec.layouts[0]) for layout, spec in zip(layouts, specs, strict=True)]
    blocks = []
    for spec, position, layout, of_block in zip(specs, positions, layouts, norms, strict=True):
        if layout is not None:
            only = [norm for norm in of_block if sum(norm in others for others in norms) == 1]
            unused = _unused(layer, spec, layout, position)
            blocks.append(_read_block(layer, layout, architecture, own, index, only, unused))
    return blocks


def _layout(
    layer: nn.Module, spec: BlockSpec, position: int, architecture: Architecture, index: int
) -> BlockSpec | None:
    """The layout that a block has in one layer; None if the block was removed.

    Arguments:
        position: number of the layer among those that have the block.
    """
    layouts = [layout.at(position, tuple(_first(layer, names) for names in layout.modules)) for layout in spec.layouts]
    if any(isinstance(_find(layer, layout.module), Null) for layout in layouts):
        return None
    if spec.either:
        for layout in layouts:
            needed = (layout.prefix + child for child in layout.weights if child not in layout.optional)
            if all(_find(layer, path) is not None for path in (*layout.modules, *needed)):
                return layout
        raise ArchitectureError(
            f"layers.{index}.{spec.kind} has none of the layouts that {architecture.name}.yaml lists under 'either'"
        )
    for module, names in zip(layouts[0].modules, spec.modules, strict=True):
        if _find(layer, module) is None:
            raise ArchitectureError(f"layer {index} has no {names!r}, which {architecture.name}.yaml lists")
    return layouts[0]


def _first(layer: nn.Module, names: str) -> str:
    """The first of ``a or b`` that a layer has; if it has none, the first."""
    several = names.split(" or ")
    return next((name for name in several if _find(layer, name) is not None), several[0])


def _unused(layer: nn.Module, spec: BlockSpec, layout: BlockSpec, position: int) -> tuple[str, ...]:
    """The entries in the lists of a block that belong to other layers and hold tensors."""
    lists = {layout.prefix + name for variant in spec.layouts for name in variant.lists}
    return tuple(
        f"{path}.{name}"
        for path in sorted(lists)
        for name, entry in getattr(_find(layer, path), "named_children", tuple)()
        if name != str(position) and any(True for _ in entry.parameters())
    )


def _read_block(
    layer: nn.Module,
    spec: BlockSpec,
    architecture: Architecture,
    plain: Any,
    index: int,
    norms: list[str],
    unused: tuple[str, ...] = (),
) -> Block:
    """One block of one layer.

    Arguments:
        norms: its norms that no other block of the layer has.
        unused: modules of it that belong to other layers.
    """
    name, file = f"layers.{index}.{spec.kind}", f"{architecture.name}.yaml"
    used = {part.axis for dims in spec.weights.values() for dim in dims or () for part in dim}
    used |= {*spec.scan_state, spec.passes}
    fixed = {axis: global_size(plain, key) for axis, key in architecture.fixed.items() if axis in used}
    weights, attributes = [], []
    for child, dims in spec.weights.items():
        path = spec.prefix + child
        target = _find(layer, path)
        if child in spec.optional and (target is None or isinstance(target, nn.Identity)):
            continue
        if target is None:
            raise ArchitectureError(f"{name} has no {child!r}, which {file} lists")
        matrix = target if isinstance(target, torch.Tensor) else Weight("weight", ()).tensor(target)
        if dims is None:  # never cut: each dimension is fixed at its size
            fixed |= {f"{child}.{position}": size for position, size in enumerate(matrix.shape)}
            dims = tuple((Part(f"{child}.{position}"),) for position in range(matrix.dim()))
        over = _normed_over(target, child, dims[0], spec, architecture) if child in spec.rescale else None
        if over is not None:
            epsilon, value = _epsilon(target, name, path, file)
            attributes.append(Attribute(path, epsilon, dims[0], over, value))
        if isinstance(target, torch.Tensor):
            weights.append(_tensor_weight(path, child, dims, target, spec))
            continue
        if is_linear(target) or isinstance(target, Packed):
            called = child not in spec.uncalled
            if stored_in_out(target):
                weights.append(Weight(f"{path}.weight", dims[::-1], reads=0, called=called))
            else:
                weights.append(Weight(f"{path}.weight", dims, reads=1, called=called))
            attributes += [Attribute(path, size, dims[position]) for position, size in enumerate(size_names(target))]
        elif isinstance(target, nn.Conv1d) and target.groups == target.in_channels == target.out_channels:
            weights.append(Weight(f"{path}.weight", dims, depthwise=True))
            attributes += [Attribute(path, size, dims[0]) for size in ("out_channels", "in_channels", "groups")]
        else:
            weights.append(Weight(f"{path}.weight", dims, rescaled=over))
        if getattr(target, "bias", None) is not None:
            weights.append(Weight(f"{path}.bias", dims[:1]))
    for key, value in (spec.attributes or {}).items():
        owner, _, attribute = key.rpartition(".") if not key.startswith("config.") else ("", "", key)
        path = spec.prefix + owner if owner else spec.module
        if owner in spec.rescale and not hasattr(_find(layer, path), attribute):  # no norm, or one without groups
            continue
        parts = tuple(Part(term.partition(".")[0]) for term in value)
        attributes.append(Attribute(path, attribute, parts, value[0].partition(".")[2] or "units"))

    axes = read_axes(layer, spec, architecture, plain, name, weights, attributes, fixed)
    for axis in spec.scan_state:
        if axis not in axes and axis not in fixed:
            raise ArchitectureError(f"{name}: {file} lists {axis!r} under 'scan_state', but no weight has that axis")
    attributes = [a for a in attributes if all(part.axis in axes or part.axis in fixed for part in a.parts)]
    norm_parameters = sum(p.numel() for norm in norms for p in layer.get_submodule(norm).parameters())
    removed = (*spec.modules[:-1], *norms)
    cached = next((global_size(plain, n) for key, n in (spec.cached or {}).items() if getattr(plain, key, None)), None)
    block = Block(
        name,
        index,
        spec,
        axes,
        fixed,
        tuple(weights),
        tuple(attributes),
        removed,
        norm_parameters,
        cached=cached,
        unused=unused,
    )

    listed = {weight.path: weight for weight in weights}
    for module in spec.modules:
        for path, parameter in layer.get_submodule(module).named_parameters(prefix=module):
            if path.startswith(tuple(f"{entry}." for entry in unused)):
                continue
            if path not in listed:
                raise ArchitectureError(f"{name} holds {path!r}, which {file} does not list")
            expected = block.shape(listed[path], {})
            if tuple(parameter.shape) != expected:
                raise ArchitectureError(
                    f"{name}: {path} has shape {tuple(parameter.shape)}, but {file} describes shape {expected}"
                )
    return block


def _tensor_weight(
    path: str, child: str, dims: tuple[tuple[Part, ...], ...], target: torch.Tensor, spec: BlockSpec
) -> Weight:
    """A parameter or buffer that is not the weight of a known module."""
    if not isinstance(target, nn.Parameter):
        return Weight(path, dims, buffer=True)
    if len(dims) < 2 or child in spec.elementwise:
        return Weight(path, dims, skips=spec.skip.get(child))
    return Weight(path, dims, reads=len(dims) - (2 if child in spec.transposed else 1))


def _epsilon(norm: Any, block: str, path: str, file: str) -> tuple[str, float]:
    """Name and value of the epsilon of a norm."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(value := getattr(norm, name, None), float):
            return name, value
    raise ArchitectureError(f"{block}: {path}, which {file} lists under 'rescale', has no epsilon")


def _normed_over(norm: Any, child: str, dim: tuple[Part, ...], spec: BlockSpec, architecture: Architecture) -> str:
    """Whether a norm over an axis is taken over its ``width`` or over each ``group``; some have no groups in older
    transformers."""
    counts = {named for part in dim if part.axis in architecture.axes for named in architecture.named_by(part.axis)}
    for key, terms in (spec.attributes or {}).items():
        owner, _, attribute = key.rpartition(".")
        of_groups = terms[0].endswith(".group") or not counts.isdisjoint(terms)
        if owner == child and of_groups and hasattr(norm, attribute):
            return "group"
    return "width"


def _norms(layer: nn.Module, spec: BlockSpec) -> list[str]:
    """The norms of a block that this layer has: the first of each ``a or b``."""
    norms = []
    for listed in spec.norms:
        present = [norm for norm in listed.split(" or ") if _find(layer, norm) is not None]
        if not present:
            raise ArchitectureError(
                f"{type(layer).__name__} has no norm {listed!r}, which the architecture file lists for {spec.kind!r}"
            )
        norms.append(present[0])
    return norms


def _find(layer: nn.Module, path: str) -> Any:
    """The module or parameter at a path of a layer; None if it is missing."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(layer.get_submodule(owner), name, None)
    except AttributeError:
        return None
