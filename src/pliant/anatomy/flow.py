"""Find the tensor dimensions of a model that must keep the same channels, by following channels through its graph.

A convolution starts a group of channels; an addition merges two groups; a concatenation puts stretches side by side. An
operation that is not known here fixes the groups of its inputs: the result is still right, but they cannot be cut.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

from pliant.anatomy.channel_groups import Dim, Dims, Groups, Stretch
from pliant.errors import ArchitectureError
from pliant.torch_private import operator_arguments, operator_name

# operations that treat every element by itself but lack torch's pointwise tag
_POINTWISE = {
    "to",
    "_to_copy",
    "contiguous",
    "detach",
    "alias",
    "hardswish",
    "dropout",
    "feature_dropout",
    "lift_fresh",
}
_RULES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "_convolution"),
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), "_by_channel"),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), "_reshape"),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), "_reduce"),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "slice"), "_lengthen"),
    **dict.fromkeys(("permute", "transpose"), "_permute"),
    **{name: f"_{name}" for name in ("linear", "layer_norm", "group_norm", "select", "cat", "getitem")},
    "expand": "_pointwise",
}
_SPATIAL = re.compile(r"(max_pool|avg_pool|adaptive_avg_pool|adaptive_max_pool|upsample_\w+?)(\d)d.*")
# no weight accounts for the multiply-accumulates of these, so the count would silently be wrong
_PRODUCTS = {
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "lstm", "gru", "_convolution"),
    *("scaled_dot_product_attention", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
}


def operation(node: Node) -> str:
    """The plain name of a node's operation: ``add`` for ``aten.add_.Tensor``."""
    if node.target is operator.getitem:
        return "getitem"
    return operator_name(node.target).rstrip("_")


def pointwise(node: Node) -> bool:
    """Whether every element of the output depends only on the input elements at the same position."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or operation(node) in _POINTWISE


def shape(node: Node) -> tuple[int, ...]:
    """Shape of the tensor that a node returns."""
    return tuple(node.meta["val"].shape)


def tensors(given: Any) -> list[Node]:
    """The nodes among (nested) arguments that return one tensor."""
    if isinstance(given, Node):
        return [given] if isinstance(given.meta.get("val"), torch.Tensor) else []
    if isinstance(given, Mapping):
        given = given.values()
    return (
        [node for item in given for node in tensors(item)]
        if isinstance(given, Iterable) and not isinstance(given, str)
        else []
    )


def arguments(node: Node) -> list[Any]:
    """All arguments of an operation in the order of its schema, with defaults for those left out."""
    named = operator_arguments(node.target)[len(node.args) :]
    return [*node.args, *(node.kwargs.get(argument.name, argument.default_value) for argument in named)]


class Flow:
    """Follows channels through a graph.

    Arguments:
        graph: the graph that ``torch.export`` made of a model.
        names: input node -> path, for parameters and buffers.
        batch: images in the example it was exported with.

    Attributes:
        weights: path -> tensor dimension -> its stretches; a missing dimension must not be cut.
        reads: path -> the dimension of a matrix that runs over its inputs.
        uses: path -> number of positions at which one image uses a matrix.
        producers: (channels, path of the matrix that produced them) in running order.
        depthwise: weights of convolutions in which each channel reads only itself.

    Raises:
        ArchitectureError: the cost of an operation does not follow from the weights.
    """

    def __init__(self, graph: Graph, names: Mapping[str, str], batch: int):
        self.groups = Groups()
        self.names, self.batch = names, batch
        self.weights: dict[str, dict[int, Dim]] = {}
        self.reads: dict[str, int] = {}
        self.uses: dict[str, int] = {}
        self.producers: list[tuple[Dim, str]] = []
        self.depthwise: set[str] = set()
        self._dims: dict[Node, Any] = {}
        for node in graph.nodes:
            if node.op == "output":
                for given in tensors(node.args):
                    self.groups.fix(*self._of(given))
            elif node.op == "placeholder":
                if isinstance(node.meta.get("val"), torch.Tensor) and node.name not in names:
                    self._dims[node] = (None,) * len(shape(node))
            elif node.op == "call_function" and node.meta.get("val") is not None:  # else it only asserts something
                self._dims[node] = self._rule(node)(node)

    def _rule(self, node: Node) -> Callable[[Node], Any]:
        name = operation(node)
        if name in _PRODUCTS or name.startswith("conv_") or not name:
            raise ArchitectureError(
                f"{_where(node)} uses {name or node.target}, whose cost no weight accounts for; tracing is for "
                "convolutional networks, so write an architecture file for this model"
            )
        if name in _RULES:
            return getattr(self, _RULES[name])
        if _SPATIAL.fullmatch(name):
            return self._spatial
        return self._pointwise if pointwise(node) else self._unknown

    # the dimensions of tensors

    def _of(self, node: Node) -> Dims:
        """The dimensions of a tensor. A parameter starts new groups, which merge with those of its users."""
        if node.name not in self.names:
            return self._dims[node]
        known = self.weights.setdefault(self.names[node.name], {})
        for position, size in enumerate(shape(node)):
            if position not in known:
                known[position] = None if size == 1 else self.groups.new(size)
        return tuple(known[position] for position in range(len(shape(node))))

    def _bind(self, path: str, position: int, dim: Dim) -> Dim:
        """Make a dimension of a parameter the same as ``dim``."""
        known = self.weights.setdefault(path, {})
        known[position] = self.groups.same(known[position], dim) if position in known else dim
        return known[position]

    def _bind_given(self, given: Any, position: int, dim: Dim) -> None:
        if isinstance(given, Node) and given.name in self.names:
            self._bind(self.names[given.name], position, dim)
        elif isinstance(given, Node):  # computed from others: its channels are unknown
            self.groups.fix(dim, *self._of(given))

    def _matrix(self, node: Node) -> str:
        weight: Any = node.args[1]
        if weight.name not in self.names:
            raise ArchitectureError(f"{_where(node)} computes its weights while it runs, so it cannot be traced")
        path = self.names[weight.name]
        self.reads[path] = 1
        self.uses[path] = self.uses.get(path, 0) + prod(shape(node)) // (shape(weight)[0] * self.batch)
        return path

    def _made(self, path: str, size: int) -> Dim:
        """The channels that a matrix produces."""
        if 0 not in self.weights.setdefault(path, {}):
            self.producers.append((self._bind(path, 0, self.groups.new(size)), path))
        return self.weights[path][0]

    # rules: the dimensions of the output of an operation

    def _convolution(self, node: Node) -> Dims:
        given, weight, bias, _, _, _, count = arguments(node)
        path, size = self._matrix(node), shape(weight)
        dims = self._of(given)
        channel = len(dims) - (len(size) - 2) - 1
        read, spatial = dims[channel], dims[channel + 1 :]
        self.groups.fix(*spatial)
        if count == 1:
            self._bind(path, 1, read)
            made = self._made(path, size[0])
        elif size[1] == 1:
            times = size[0] // count
            made = None if read is None else tuple(Stretch(s.group, s.factor * times) for s in read)
            made = self._bind(path, 0, made)
            self.depthwise.add(path)
        else:  # the position of a channel decides which inputs it meets
            self.groups.fix(read, self._bind(path, 0, None))
            made = None
        self._bind_given(bias, 0, made)
        return (*dims[:channel], made, *(None,) * len(spatial))

    def _linear(self, node: Node) -> Dims:
        given, weight, bias = arguments(node)
        path = self._matrix(node)
        dims = self._of(given)
        self._bind(path, 1, dims[-1])
        made = self._made(path, shape(weight)[0])
        self._bind_given(bias, 0, made)
        return (*dims[:-1], made)

    def _by_channel(self, node: Node) -> Dims:
        given, *affine = arguments(node)
        dims = self._of(given)
        for parameter in affine:
            if isinstance(parameter, Node) and shape(parameter) == (shape(node)[1],):
                self._bind_given(parameter, 0, dims[1])
        return dims

    def _layer_norm(self, node: Node) -> Dims:
        given, normed, *affine = arguments(node)
        dims = self._of(given)
        if len(normed) > 1:
            return self._unknown(node)
        self.groups.norm(dims[-1])
        for parameter in affine[:2]:
            self._bind_given(parameter, 0, dims[-1])
        return dims

    def _group_norm(self, node: Node) -> Dims:
        given, count, *affine = arguments(node)
        dims = self._of(given)
        if count == 1:
            self.groups.norm(dims[1])
        elif count != shape(node)[1]:
            self.groups.fix(dims[1])
        for parameter in affine[:2]:
            self._bind_given(parameter, 0, dims[1])
        return dims

    def _pointwise(self, node: Node) -> Dims:
        out = shape(node)
        made: list[Dim] = [None] * len(out)
        given = [(shape(source), self._of(source)) for source in tensors((node.args, node.kwargs))]
        for position in range(1, len(out) + 1):  # broadcasting counts from the right
            full = [
                dims[-position] for size, dims in given if len(size) >= position and size[-position] == out[-position]
            ]
            if full:
                made[-position] = full[0]
                for other in full[1:]:
                    made[-position] = self.groups.same(made[-position], other)
        return tuple(made)

    def _spatial(self, node: Node) -> Any:
        dims = self._of(arguments(node)[0])
        match = _SPATIAL.fullmatch(operation(node))
        assert match is not None
        count = int(match[2])
        self.groups.fix(*dims[-count:])
        made = (*dims[:-count], *(None,) * count)
        return made if isinstance(node.meta["val"], torch.Tensor) else [made] * len(node.meta["val"])

    def _lengthen(self, node: Node) -> Dims:
        """Padding and slicing fix a dimension whose length changes."""
        given = arguments(node)[0]
        dims = self._of(given)
        unchanged = [a == b for a, b in zip(shape(given), shape(node), strict=True)]
        self.groups.fix(*(dim for dim, same in zip(dims, unchanged, strict=True) if not same))
        return tuple(dim if same else None for dim, same in zip(dims, unchanged, strict=True))

    def _select(self, node: Node) -> Dims:
        given, position, _ = arguments(node)
        dims = list(self._of(given))
        self.groups.fix(dims.pop(position))
        return tuple(dims)

    def _cat(self, node: Node) -> Dims:
        parts, where = arguments(node)
        where %= len(shape(node))
        given = [(shape(part), self._of(part)) for part in parts]
        made: list[Dim] = []
        for position in range(len(shape(node))):
            dims = [of_part[position] for _, of_part in given]
            if position != where:
                dim = dims[0]
                for other in dims[1:]:
                    dim = self.groups.same(dim, other)
                made.append(dim)
            elif all(dim is None for dim in dims):
                made.append(None)
            else:
                made.append(
                    tuple(s for size, of_part in given for s in of_part[position] or self._standing(size[position]))
                )
        return tuple(made)

    def _standing(self, size: int) -> tuple[Stretch, ...]:
        """A fixed dimension, beside others that can be cut."""
        dim = self.groups.new(size)
        self.groups.fix(dim)
        return dim

    def _reduce(self, node: Node) -> Dims:
        given, over, *_ = arguments(node)
        dims = self._of(given)
        reduced = {position % len(dims) for position in (isinstance(over, Sequence) and over) or range(len(dims))}
        self.groups.fix(*(dims[position] for position in reduced))
        if len(shape(node)) == len(dims):
            return tuple(None if position in reduced else dim for position, dim in enumerate(dims))
        return tuple(dim for position, dim in enumerate(dims) if position not in reduced)

    def _permute(self, node: Node) -> Dims:
        given, *places = arguments(node)
        dims = self._of(given)
        order = list(range(len(dims)))
        if operation(node) == "permute":
            (order,) = places
        else:
            a, b = places
            order[a], order[b] = order[b], order[a]
        return tuple(dims[position] for position in order)

    def _reshape(self, node: Node) -> Dims:
        """Channels survive a reshape that leaves them alone or merges later dimensions into them: (C, H, W) ->
        (C·H·W)."""
        given = arguments(node)[0]
        before, after = shape(given), shape(node)
        dims = self._of(given)
        sources = [position for position, size in enumerate(before) if size > 1]
        targets = [position for position, size in enumerate(after) if size > 1]
        self.groups.fix(*(dims[position] for position, size in enumerate(before) if size == 1))
        made: list[Dim] = [None] * len(after)
        while sources and targets:
            from_, to = [sources.pop(0)], [targets.pop(0)]
            while (a := prod(before[p] for p in from_)) != (b := prod(after[p] for p in to)):
                from_, to = (from_, [*to, targets.pop(0)]) if a > b else ([*from_, sources.pop(0)], to)
            outer, *inner = (dims[position] for position in from_)
            if outer is not None and len(to) == 1:
                times = prod(before[position] for position in from_[1:])
                self.groups.fix(*inner)
                made[to[0]] = tuple(Stretch(s.group, s.factor * times) for s in outer)
            else:
                self.groups.fix(outer, *inner)
        return tuple(made)

    def _getitem(self, node: Node) -> Any:
        several, position = arguments(node)
        return self._dims[several][position]

    def _unknown(self, node: Node) -> Any:
        for given in tensors((node.args, node.kwargs)):
            self.groups.fix(*self._of(given))
        if isinstance(node.meta["val"], torch.Tensor):
            return (None,) * len(shape(node))
        return [(None,) * value.dim() if isinstance(value, torch.Tensor) else None for value in node.meta["val"]]


def _where(node: Node) -> str:
    """The module that a node is in, for error messages."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return repr(stack[-1][0]) if stack and stack[-1][0] else "the model"
