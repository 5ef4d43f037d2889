"""Read the anatomy of a convolutional network from the operations that it runs, without an architecture file.

The model is exported once to find which channels must be cut together (``flow.py``) and which modules can be skipped
(``residual.py``). The result is an anatomy like any other, of one layer, the model itself, so that everything that
works on axes and blocks works on it. An axis is shared by all blocks that its channels run through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pliant.anatomy.anatomy import Anatomy, Traced
from pliant.anatomy.block import Attribute, Axis, Block, Weight
from pliant.anatomy.channel_groups import Dim, Stretch
from pliant.anatomy.flow import Flow
from pliant.anatomy.probe import evaluating, probe, remember
from pliant.anatomy.residual import residual_modules
from pliant.architecture import BlockSpec, Part
from pliant.errors import ArchitectureError
from pliant.runtime.dense import CONVOLUTIONS

REST = "rest"
CHANNEL_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_read: WeakKeyDictionary[nn.Module, tuple[Any, Anatomy]] = WeakKeyDictionary()


def traceable(model: Any) -> bool:
    """Whether a model has convolutions to trace."""
    return isinstance(model, nn.Module) and any(isinstance(module, CONVOLUTIONS) for module in model.modules())


def traced(model: nn.Module, example: Any = None) -> Anatomy:
    """Read the anatomy of a model by following an example through it.

    A model is traced again only if its modules, its shapes or those of the example have changed.

    Arguments:
        example: input of ``forward``; see :func:`pliant.anatomy.probe.remember`. Default: the last example given for
            this model, else random pixels.

    Raises:
        ArchitectureError: the model does not run on the example, or has operations that cannot be followed.
    """
    if example is not None:
        remember(model, example)
    inputs = probe(model)
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    now = (modules, shapes, {name: getattr(value, "shape", value) for name, value in inputs.items()})
    if model not in _read or _read[model][0] != now:
        _read[model] = (now, _trace(model, inputs))
    return _read[model][1]


def _trace(model: nn.Module, inputs: dict[str, Any]) -> Anatomy:
    try:
        with evaluating(model), torch.no_grad():
            exported = torch.export.export(model, (), inputs, strict=False)
    except Exception as error:  # a model's own code can raise anything on an unsuitable input
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in inputs.items()}
        raise ArchitectureError(
            f"{type(model).__name__} cannot be traced on an input of shape {shapes} ({str(error).splitlines()[0]}); "
            "pass an example that it runs on: anatomy_of(model, example=…)"
        ) from error
    first_name = {
        **_first_names(model.named_parameters(remove_duplicate=False)),
        **_first_names(model.named_buffers(remove_duplicate=False)),
    }
    signature = exported.graph_signature
    held: dict[str, Any] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names: dict[str, str] = {node: first_name.get(path) or path for node, path in held.items()}
    batch = next(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor))
    flow = Flow(exported.graph, names, batch)
    for path in _held_twice(model):
        flow.groups.fix(*flow.weights.get(first_name[path], {}).values())
    removable = residual_modules(model, inputs, exported.graph, names)
    reader = _Reader(model, flow)
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None) or type(model).__name__
    blocks = reader.blocks(removable)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Anatomy(
        source=Traced(name),
        blocks=blocks,
        depth=1,
        layer_types=("",),
        rest=total - sum(block.parameters({}) for block in blocks.values()),
        head=0,
    )


def _first_names(named: Iterable[tuple[str, torch.Tensor]]) -> dict[Any, str]:
    """path -> the first path of the same tensor."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(tensor), path) for path, tensor in named}


def _held_twice(model: nn.Module) -> list[str]:
    """Parameters that two different modules hold: cutting one of them would separate them."""
    holders: dict[int, dict[tuple[int, str], str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        holders.setdefault(id(parameter), {}).setdefault((id(model.get_submodule(owner)), name), path)
    return [next(iter(paths.values())) for paths in holders.values() if len(paths) > 1]


class _Reader:
    """Turns the results of a flow into blocks and axes."""

    def __init__(self, model: nn.Module, flow: Flow):
        self.model, self.flow = model, flow
        groups = flow.groups
        self.axes: dict[int, Axis] = {}
        for made, path in flow.producers:
            stretches = groups.resolve(made)
            if len(stretches) == 1 and stretches[0].factor == 1:
                group = stretches[0].group
                name = f"{path.rpartition('.')[0] or path}.channels"
                if group not in self.axes and not groups.is_fixed(group):
                    self.axes[group] = Axis(name, groups.sizes[group], 1, name, 1, None, normed=groups.is_normed(group))

    def blocks(self, removable: list[str]) -> dict[str, Block]:
        """The block of everything that must stay, then the removable blocks."""
        weights = list(self._weights())
        own = [path for path in removable if self._is_whole(path, weights)]
        members: dict[str, list[Weight]] = {REST: [], **{path: [] for path in own}}
        for weight in weights:
            owner = next((path for path in own if weight.path.startswith(f"{path}.")), REST)
            members[owner].append(weight)
        return {name: self._block(name, weights) for name, weights in members.items()}

    @staticmethod
    def _is_whole(path: str, weights: list[Weight]) -> bool:
        """Whether no weight outside a module lives on an axis that is named after a matrix inside."""
        outside = [weight for weight in weights if not weight.path.startswith(f"{path}.")]
        return not any(part.axis.startswith(f"{path}.") for w in outside for dim in w.dims for part in dim)

    def _block(self, name: str, weights: list[Weight]) -> Block:
        kind = REST if name == REST else "residual"
        path = "" if name == REST else name
        attributes = [attribute for weight in weights for attribute in self._attributes(weight)]
        parts = {part.axis for dims in weights for dim in dims.dims for part in dim}
        return Block(
            name=name,
            layer=0,
            spec=BlockSpec(kind, (path,), (), {}, residual=0),
            axes={axis.leader: axis for axis in self.axes.values() if axis.leader in parts},
            fixed={part: int(part) for part in parts if part.isdigit()},
            weights=tuple(weights),
            attributes=tuple(dict.fromkeys(attributes)),
            removed=(),
            norm_parameters=0,
            removable=name != REST,
        )

    def _weights(self) -> Iterable[Weight]:
        flow = self.flow
        for path, parameter in self.model.named_parameters():
            known = flow.weights.get(path, {})
            dims = tuple(self._parts(known.get(position), size) for position, size in enumerate(parameter.shape))
            yield Weight(path, dims, flow.reads.get(path), flow.uses.get(path, 1))
        for path, buffer in self.model.named_buffers():
            known = flow.weights.get(path, {})
            dims = tuple(self._parts(known.get(position), size) for position, size in enumerate(buffer.shape))
            if any(not part.axis.isdigit() for dim in dims for part in dim):
                yield Weight(path, dims, buffer=True)

    def _parts(self, dim: Dim, size: int) -> tuple[Part, ...]:
        """The parts of a dimension; a fixed stretch is named by its size."""
        if dim is None:
            return (Part(str(size)),)
        return tuple(self._part(stretch) for stretch in self.flow.groups.resolve(dim))

    def _part(self, stretch: Stretch) -> Part:
        axis = self.axes.get(stretch.group)
        return Part(str(self.flow.groups.sizes[stretch.group]) if axis is None else axis.leader, stretch.factor)

    def _attributes(self, weight: Weight) -> list[Attribute]:
        """The plain attributes that hold sizes and that ``forward`` or ``repr`` of a weight's module read."""
        path, _, _ = weight.path.rpartition(".")
        owner = self.model.get_submodule(path)
        first = weight.dims[0] if weight.dims else ()
        sizes: dict[str, tuple[Part, ...]] = {}
        if isinstance(owner, CONVOLUTIONS) and weight.path in self.flow.depthwise:
            times = owner.out_channels // owner.in_channels
            read = tuple(Part(part.axis, max(1, part.factor // times)) for part in first)
            sizes = {"out_channels": first, "in_channels": read, "groups": read}
        elif isinstance(owner, CONVOLUTIONS) and weight.reads is not None and owner.groups == 1:
            sizes = {"out_channels": first, "in_channels": weight.dims[1]}
        elif isinstance(owner, nn.Linear) and weight.reads is not None:
            sizes = {"out_features": first, "in_features": weight.dims[1]}
        elif isinstance(owner, CHANNEL_NORMS):
            sizes = {"num_features": first}
        elif isinstance(owner, nn.LayerNorm):
            sizes = {"normalized_shape": first}
        elif isinstance(owner, nn.GroupNorm):
            sizes = {"num_channels": first} | ({} if owner.num_groups == 1 else {"num_groups": first})
        return [
            Attribute(path, name, parts)
            for name, parts in sizes.items()
            if any(not part.axis.isdigit() for part in parts)
        ]
