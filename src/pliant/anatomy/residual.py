"""Find the modules of a traced model that can be skipped: those that only add something to their input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from pliant.anatomy.flow import operation, pointwise, shape, tensors
from pliant.anatomy.null import Null
from pliant.anatomy.probe import evaluating, output_of

_SAME = {"dropout", "feature_dropout", "contiguous", "clone", "alias", "detach"}


def residual_modules(model: nn.Module, inputs: Mapping[str, Any], graph: Graph, names: Mapping[str, str]) -> list[str]:
    """Paths of the modules that can be skipped, in the order in which they run.

    Such a module returns ``act(x + f(x))``, and ``act`` does not change the ``x`` that flows there: the ReLU after a
    ResNet layer, because ``x`` comes out of a ReLU. This is tested on the inputs, and so is that the rest of the model
    runs without these modules.

    Arguments:
        names: input node -> path, for parameters and buffers.
    """
    inside: dict[str, set[Node]] = defaultdict(set)
    calls: dict[str, set[str]] = defaultdict(set)
    for node in graph.nodes:
        for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
            inside[path.partition("@")[0]].add(node)
            calls[path.partition("@")[0]].add(call)
    found: dict[str, list[Node]] = {}
    for path, nodes in inside.items():
        if path and len(calls[path]) == 1 and (after := _activations(path, nodes, names)) is not None:
            found[path] = after
    inner = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
    order = {node: index for index, node in enumerate(graph.nodes)}
    inner.sort(key=lambda path: min(order[node] for node in inside[path]))
    return _proven(model, inputs, {path: found[path] for path in inner})


def _activations(path: str, nodes: set[Node], names: Mapping[str, str]) -> list[Node] | None:
    """The operations of a module after the addition of its input, in order; None if it does not add its input."""
    given, own = set(), set()
    for node in nodes:
        for source in node.all_input_nodes:
            if source.name in names:
                own.add(source)
            elif source not in nodes:
                given.add(source)
    given_out = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(given) != 1 or len(given_out) != 1 or not own:
        return None
    shared = any(not names[p.name].startswith(f"{path}.") or any(user not in nodes for user in p.users) for p in own)
    (start,), (node,) = given, given_out
    if shared or not isinstance(node.meta.get("val"), torch.Tensor) or shape(start) != shape(node):
        return None
    after: list[Node] = []
    while operation(node) != "add" and pointwise(node) and len(tensors(node.args)) == 1 and node in nodes:
        after.insert(0, node)
        (node,) = tensors(node.args)
    return after if operation(node) == "add" and _adds(node, start, nodes) else None


def _adds(node: Node, start: Node, nodes: set[Node]) -> bool:
    """Whether ``start`` is one of the summands of ``node``."""
    if node is start:
        return True
    return (
        node in nodes and operation(node) in {"add", *_SAME} and any(_adds(a, start, nodes) for a in tensors(node.args))
    )


@torch.no_grad()
def _proven(model: nn.Module, inputs: Mapping[str, Any], found: Mapping[str, Sequence[Node]]) -> list[str]:
    """The modules that can be skipped, tested with all of them present and with all of them skipped."""
    with evaluating(model):
        proven = _unchanged(model, inputs, found)
        aside = {path: model.get_submodule(path) for path in proven}
        try:
            for path in aside:
                model.set_submodule(path, Null(residual=0))
            return [path for path in _unchanged(model, inputs, found) if path in aside]
        except (AttributeError, RuntimeError, TypeError):  # a model that reaches into its blocks needs them
            return []
        finally:
            for path, module in aside.items():
                model.set_submodule(path, module)


def _unchanged(model: nn.Module, inputs: Mapping[str, Any], found: Mapping[str, Sequence[Node]]) -> list[str]:
    """The modules that take one tensor, return one of its shape, and whose activations do not change it."""
    seen: dict[str, torch.Tensor] = {}
    proven = set()

    def watch(path: str) -> list[Any]:
        def before(_module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], torch.Tensor):
                seen[path] = args[0].clone()

        def after(_module: nn.Module, _args: tuple, output: Any) -> None:
            x = seen.pop(path, None)
            if x is None or not isinstance(output, torch.Tensor) or output.shape != x.shape:
                return
            y: Any = x.clone()
            for node in found[path]:
                y = node.target(y, *node.args[1:], **node.kwargs)  # type: ignore[operator]
            if torch.equal(x, y):
                proven.add(path)

        module = model.get_submodule(path)
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    handles = [handle for path in found for handle in watch(path)]
    try:
        output_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in found if path in proven]
