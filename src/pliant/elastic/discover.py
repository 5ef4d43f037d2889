"""Infer the architecture of a model that no file describes, if its layout is a common one.

The result is an architecture like any other and has to pass the self-check: a wrong guess is refused, not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy, anatomy_of, holders_of, layer_config, plain_config, probe, text_config_of
from pliant.elastic.check import check
from pliant.errors import ArchitectureError, UnknownArchitectureError

# how the names of the matrices begin
ATTENTION = {"q": ("q",), "k": ("k",), "v": ("v",), "o": ("o", "dense", "c_proj", "proj")}


def described(model: Any) -> Anatomy:
    """The anatomy of any model, read with its architecture file or else discovered.

    Raises:
        ArchitectureError: neither is possible.
    """
    try:
        return anatomy_of(model)
    except UnknownArchitectureError:
        return discover(model)


def discover(model: Any) -> Anatomy:
    """Infer the architecture of an unknown model, check it, and record it in ``model.config``.

    Layers may have one attention of separate query, key, value and output matrices and one MLP of two or three
    matrices, each a module of its own, with norms before or after them or shared.

    Raises:
        ArchitectureError: the layout is another one, and the message says where; or it fails the self-check.
    """
    held: Any = text_config_of(model.config)
    config = layer_config(plain_config(held), 0)
    try:
        raw = _read(model, config)
    except ArchitectureError as error:
        raise ArchitectureError(
            f"no architecture file describes model_type {config.model_type!r}, and its layout could not be inferred: "
            f"{error}. Write an architecture file: see docs/architectures.md, pliant.add_architecture, and the option "
            "--architecture"
        ) from None
    held.pliant_architecture = raw
    try:
        anatomy = anatomy_of(model)
        check(model, anatomy)
    except ArchitectureError as error:
        del held.pliant_architecture
        raise ArchitectureError(
            f"no architecture file describes model_type {config.model_type!r}, and the inferred layout failed the "
            f"self-check: {error}. Write an architecture file: see 'Add an architecture' in CONTRIBUTING.md"
        ) from None
    return anatomy


def _read(model: Any, config: Any) -> dict[str, Any]:
    path, layers = _layers(model)
    layer, hidden = layers[0], config.hidden_size
    children = dict(layer.named_children())
    attention = [name for name, child in children.items() if _roles(child)]
    mlps = [name for name, child in children.items() if name not in attention and _mlp(child, hidden)]
    norms = [name for name, child in children.items() if _is_norm(child, hidden)]
    for part, candidates in (("attention", attention), ("MLP", mlps)):
        if len(candidates) != 1:
            raise ArchitectureError(
                f"a layer has {len(candidates)} modules that could be its {part}; it must have exactly 1"
            )
    others = [
        name
        for name, child in children.items()
        if name not in (*attention, *mlps, *norms) and any(True for _ in child.parameters())
    ]
    if others:
        raise ArchitectureError(f"a layer holds {others[0]!r}, which is neither attention, MLP nor norm")
    used, tuples, layer_tuple = _run(model, layer, [*attention, *mlps], norms)
    heads, raw_attention = _attention(children[attention[0]], config)
    channels, raw_mlp = _mlp_block(children[mlps[0]], config)
    blocks = {}
    for kind, name, block in (("attention", attention[0], raw_attention), ("mlp", mlps[0], raw_mlp)):
        blocks[kind] = {"module": name, "norms": used[name], **block}
        if tuples[name]:
            blocks[kind]["output"] = "tuple"
    head_dim = "head_dim or hidden_size // num_attention_heads"
    return {
        "models": [config.model_type],
        "layers": path,
        "output": "tuple" if layer_tuple else "tensor",
        "fixed": {"hidden": "hidden_size", "head": head_dim},
        "axes": {**heads, **channels},
        "blocks": blocks,
    }


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and modules of the longest list of modules of one class; in a multimodal model, the longest in the part
    that its text config describes."""
    inside = {module for holder in holders_of(model) for module in holder.modules()}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(item) for item in module}) == 1
        if module in inside
    ]
    if not lists:
        raise ArchitectureError("the part that its text config describes has no list of layers of one class")
    return max(lists, key=lambda pair: len(pair[1]))


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


def _is_norm(module: nn.Module, hidden: int) -> bool:
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    return not list(module.children()) and "norm" in type(module).__name__.lower() and set(shapes) <= {(hidden,)}


def _roles(module: nn.Module) -> dict[str, str]:
    """Role -> name of each of an attention's four matrices; empty if the module is not an attention."""
    linears = _linears(module)
    if len(linears) != 4:
        return {}
    roles: dict[str, str] = {}
    for role, begins in ATTENTION.items():
        names = [name for name in linears if name.startswith(begins) and name not in roles.values()]
        if len(names) != 1:
            return {}
        roles[role] = names[0]
    return roles


def _mlp(module: nn.Module, hidden: int) -> dict[str, list[str]]:
    """The matrices of an MLP that read the residual stream, and the one that writes it; empty if the module is not an
    MLP."""
    linears = _linears(module)
    ups = [name for name, linear in linears.items() if linear.in_features == hidden and linear.out_features != hidden]
    downs = [name for name, linear in linears.items() if linear.out_features == hidden and name not in ups]
    widths = {linears[name].out_features for name in ups} | {linears[name].in_features for name in downs}
    if len(downs) != 1 or len(ups) not in (1, 2) or len(linears) != len(ups) + 1 or len(widths) != 1:
        return {}
    return {"ups": ups, "down": downs}


def _attention(module: Any, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes and block of an attention."""
    roles, linears = _roles(module), _linears(module)
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    out = {role: linears[name].out_features for role, name in roles.items()}
    if out["q"] != heads * width or out["k"] != (groups or heads) * width or out["v"] != out["k"]:
        raise ArchitectureError(
            f"queries, keys and values have {out['q']}, {out['k']} and {out['v']} elements, which do not make {heads} "
            f"heads of width {width}"
        )
    unit = "head_dim or hidden_size // num_attention_heads"
    if groups is None:
        axes: dict[str, Any] = {"heads": {"size": "num_attention_heads", "unit": unit}}
    else:
        axes = {"kv": {"size": "num_key_value_heads", "unit": unit}}
        axes["heads"] = {"size": "num_attention_heads", "unit": unit, "follows": "kv"}
    keys = "heads" if groups is None else "kv"
    weights: dict[str, Any] = {
        roles["q"]: ["heads", "hidden"],
        roles["k"]: [keys, "hidden"],
        roles["v"]: [keys, "hidden"],
        roles["o"]: ["hidden", "heads"],
    }
    for name, child in module.named_children():
        sizes = {tuple(parameter.shape) for parameter in child.parameters()}
        if name not in weights and sizes:
            if sizes != {(width,)}:  # a norm over all heads, or another tensor from which heads cannot be cut
                next(iter(axes.values()))["cut"] = False
            weights[name] = ["head"] if sizes == {(width,)} else "whole"
    block: dict[str, Any] = {"scores": "heads", "weights": weights}
    if isinstance(getattr(module, "layer_idx", None), int):
        block["slot"] = "layer_idx"
    counted = {"num_heads": "heads", "num_attention_heads": "heads", "num_key_value_heads": keys}
    block["attributes"] = {name: axis for name, axis in counted.items() if isinstance(getattr(module, name, None), int)}
    return axes, block


def _mlp_block(module: nn.Module, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes and block of an MLP."""
    matrices = _mlp(module, config.hidden_size)
    width = _linears(module)[matrices["down"][0]].in_features
    keys = [key for key, value in vars(config).items() if type(value) is int and value == width and key != "vocab_size"]
    if not keys:
        raise ArchitectureError(f"no key of the config holds the {width} channels of the MLP")
    key = "intermediate_size" if "intermediate_size" in keys else keys[0]
    weights: dict[str, Any] = {name: ["channels", "hidden"] for name in matrices["ups"]}
    weights |= {matrices["down"][0]: ["hidden", "channels"]}
    others = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in weights]
    weights |= dict.fromkeys(others, "whole")  # the parameters of an activation function
    return {"channels": {"size": key}}, {"weights": weights}


@torch.no_grad()
def _run(
    model: Any, layer: nn.Module, blocks: list[str], norms: list[str]
) -> tuple[dict[str, list[str]], dict[str, bool], bool]:
    """Run the model once and record of one layer which norms come right before or after which block.

    Returns:
        The norms of each block; which blocks return a tuple; whether the layer does.
    """
    seen: dict[str, tuple[Any, Any]] = {}

    def record(name: str):
        def hook(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            seen[name] = (args[0] if args else kwargs.get("hidden_states"), output)

        return hook

    handles = [
        layer.get_submodule(name).register_forward_hook(record(name), with_kwargs=True) for name in (*blocks, *norms)
    ]
    handles.append(layer.register_forward_hook(record(""), with_kwargs=True))
    try:
        model(**probe(model))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ArchitectureError(f"it does not run on a few tokens ({str(error).splitlines()[0]})") from error
    finally:
        for handle in handles:
            handle.remove()

    def first(output: Any) -> Any:
        return output[0] if isinstance(output, tuple) else output

    used = {
        block: [
            norm
            for norm in norms
            if norm in seen and (seen[norm][1] is seen[block][0] or seen[norm][0] is first(seen[block][1]))
        ]
        for block in blocks
    }
    return used, {block: isinstance(seen[block][1], tuple) for block in blocks}, isinstance(seen[""][1], tuple)
