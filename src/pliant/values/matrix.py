"""Select the weight matrices that a step on values changes, and report the parameters that it skips."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pliant.anatomy import anatomy_of, layers_of
from pliant.architecture import catalogue
from pliant.checkpoint.fingerprint import check_finite
from pliant.errors import ArchitectureError, StepError
from pliant.pages import within_limit
from pliant.record import Note, Section
from pliant.runtime.dense import CONVOLUTIONS, is_linear, own_parameter, weight_of, why_fixed, why_kept
from pliant.step import Job, Step
from pliant.step_setting import setting
from pliant.torch_private import is_compiled

ALL = "all-linear"
OUTSIDE = f"linear layers outside the blocks (target_modules={ALL!r} includes them)"
HEAD = "the output head (its name in target_modules includes it)"
UNNAMED = "linear layers that target_modules does not match"
NAMED = 0.001  # kinds of skipped parameters below this share of the model are not named
UNCALLED = "linear layers whose weight is read by their block, which never calls them"
EXCLUDED = "linear layers that exclude_modules matches"


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or a stack of them.

    Attributes:
        name: what holds it, e.g. ``model.layers.3.mlp.up_proj``.
        path: name of the parameter.
        weight: a view of its values with inputs last, shape ``(out, in)`` or ``(experts, out, in)``.
        layer: the linear layer that it belongs to; None for a parameter outside linear layers: a stack of experts, a
            router.
        names: all names of that layer: one module may be registered in several places.
        called: its layer is called. If not, its block reads the weight itself.
    """

    name: str
    path: str
    weight: torch.Tensor
    layer: nn.Module | None = None
    names: tuple[str, ...] = ()
    called: bool = True


@dataclass
class Selection:
    """The matrices that a step on values changes, and those that it skips.

    Attributes:
        matrices: the matrices to change.
        left: name of a skipped linear layer or stack -> the reason.
    """

    matrices: list[Matrix] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def changing(self, model: nn.Module) -> Iterator[Iterator[Matrix]]:
        """The matrices, to be changed in place one after the other: there may be no memory for a copy of the original
        weights.

        After an error or Ctrl-C some of them are changed and others are not. A note on the exception says so.
        """
        rest = iter(self.matrices)
        try:
            yield within_limit(model, rest)
        except BaseException as error:
            begun = len(self.matrices) - length_hint(rest)
            error.add_note(
                f"{begun} of {len(self.matrices)} weight matrices may have been changed; load the model again"
            )
            raise


class ValueStep(Step):
    """Base of the steps on values, with the selection of layers. These steps work on any module with linear layers."""

    family: ClassVar[str] = "values"
    reshapes: ClassVar[bool] = False

    target_modules: str | Sequence[str] | None = setting(
        "The linear layers to change, as in peft: names or name endings; or a regular expression that matches whole "
        "names; or all-linear. Default: those in the blocks if the model has an architecture file, otherwise all.",
        default=None,
    )

    exclude_modules: str | Sequence[str] | None = setting(
        "Linear layers to skip: names or name endings, or a regular expression that matches whole names.", default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _checked(name, getattr(self, name)))


def _checked(setting: str, value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        try:
            re.compile(value or "")
        except re.error as error:
            raise StepError(f"{setting}: {value!r} is not a valid regular expression: {error}") from None
        return value or None
    if not isinstance(value, list | tuple | set) or not value or not all(isinstance(one, str) for one in value):
        raise StepError(f"{setting} must be a list of names, a regular expression or {ALL!r}; not {value!r}")
    return tuple(sorted(value) if isinstance(value, set) else value)


def select_matrices(
    model: nn.Module,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    replaces: bool = False,
    head: bool = False,
) -> Selection:
    """Select the weight matrices that a step changes.

    By default they are those in the blocks if the model has an architecture file, otherwise those of all linear layers.

    Arguments:
        target: names or name endings; or a regular expression that matches whole names; or ``all-linear``.
        exclude: the same, for layers to skip.
        replaces: the step replaces linear layers, so that stacks of experts are skipped.
        head: include the output head of a language model, unless ``target`` lists layers.

    Raises:
        StepError: a name or pattern matches no layer, no layer can be changed, or the model has no weights.
        WeightError: the weights are not finite.
    """
    _ready(model)
    blocks = list(_blocks(model))
    everything = _candidates(model, blocks)
    inside = {matrix.name: matrix for matrix in blocks}
    output = head_of(model)
    chosen = None if target in (None, ALL) else _named(everything, target, "target_modules")
    excluded = set() if exclude is None else _named(everything, exclude, "exclude_modules")
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found, seen = Selection(), set()
    for name, one in everything.items():
        if name in excluded:
            why = EXCLUDED
        elif chosen is not None:
            why = "" if name in chosen else UNNAMED
        elif output is not None and name == output[0]:
            why = "" if head else HEAD
        else:
            why = OUTSIDE if inside and target is None and name not in inside else ""
        if not why and replaces and name in inside and not inside[name].called:
            why = UNCALLED
        why = why or _why_skipped(model, name, one, replaces)
        weight = id(_parameter(model, one))
        if not why and not replaces and weight in embedded:
            why = "linear layers that share their weight with an embedding"
        if why:
            found.left[name] = why
        elif replaces or weight not in seen:  # values that two layers share are changed once
            found.matrices.append(one)
            seen.add(weight)
    if not found.matrices:
        reasons = "; ".join(dict.fromkeys(found.left.values())) or f"{type(model).__name__} has no linear layers"
        raise StepError(f"these settings can change none of the linear layers: {reasons}")
    return found


def head_of(model: Any) -> tuple[str, nn.Module] | None:
    """The name and module of a language model's output head, if it has one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next(((name, module) for name, module in model.named_modules() if module is head), None) if head else None


def show_skipped(job: Job, found: Selection, changed: int) -> None:
    """Record the parameters that a step has skipped, and show them."""
    job.record["left"] = skipped_parameters(job.model, found, changed)
    job.show(*skipped_note(job.record["left"]))


def skipped_parameters(model: nn.Module, found: Selection, changed: int) -> dict[str, Any]:
    """Summarise the parameters that a step has skipped.

    Arguments:
        changed: number of parameters that it has changed.

    Returns:
        ``parameters``, ``bytes`` and ``share`` (of all parameters); ``reasons``: for each reason ``why``,
        ``parameters``, ``bytes`` and the ``names`` of layers, the largest first.
    """
    still = (one for one in found.matrices if one.layer is None or model.get_submodule(one.name) is one.layer)
    seen = {id(_parameter(model, one)) for one in still}
    kinds: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{name}.{own}" if name else own
            why = found.left.get(name) or found.left.get(full) or _kind(module, parameter)
            kind = kinds.setdefault(why, {"why": why, "parameters": 0, "bytes": 0, "names": []})
            kind["parameters"] += parameter.numel()
            kind["bytes"] += parameter.nbytes
            of = name if own == "weight" else full
            if parameter.dim() > 1 and of not in kind["names"]:
                kind["names"].append(of)
    for name, why in found.left.items():  # those without parameters that are not counted elsewhere
        kind = kinds.setdefault(why, {"why": why, "parameters": 0, "bytes": 0, "names": []})
        if name not in kind["names"]:
            kind["names"].append(name)
    count = sum(kind["parameters"] for kind in kinds.values())
    return {
        "parameters": count,
        "bytes": sum(kind["bytes"] for kind in kinds.values()),
        "share": count / (count + changed) if count + changed else 0.0,
        "reasons": sorted(kinds.values(), key=lambda kind: -kind["parameters"]),
    }


def skipped_note(left: Mapping[str, Any], done: str = "changed") -> list[Section]:
    """One sentence on the parameters that :func:`skipped_parameters` counts, if there are any.

    Arguments:
        done: what the step has done to the others.
    """
    if not left["parameters"]:
        return []
    shares = [(kind["parameters"] * left["share"] / left["parameters"], kind["why"]) for kind in left["reasons"]]
    kinds = [f"{share:.1%} {why}" for share, why in shares if share >= NAMED] or [shares[0][1]]
    size = f"{left['bytes'] / 1e6:,.1f} MB"
    return [Note(f"Not {done}: {left['share']:.1%} of the parameters ({size}), of which {'; '.join(kinds)}.")]


def _parameter(model: nn.Module, matrix: Matrix) -> torch.Tensor | None:
    """The parameter that holds a matrix; None if there is none, or the layer was replaced."""
    if matrix.layer is not None:
        return own_parameter(matrix.layer, "weight")
    return model.get_parameter(matrix.path)


def _ready(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if any(is_lazy(parameter) for parameter in parameters):
        raise StepError("this module has lazy layers without weights; run it on an input first")
    if any(parameter.is_meta for parameter in parameters):
        raise StepError("this module is on the meta device and has no weights; load its weights first")
    check_finite(model)


def _candidates(model: nn.Module, blocks: Sequence[Matrix]) -> dict[str, Matrix]:
    """First name -> matrix, for all linear layers (even those quantised by other libraries) and stacks of experts in
    blocks."""
    names: dict[int, list[str]] = {}
    layers: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        scripted = isinstance(module, torch.jit.ScriptModule) and module.original_name == "Linear"
        if is_linear(module) or scripted or (hasattr(module, "in_features") and hasattr(module, "out_features")):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    found = {}
    for key, own in names.items():
        layer = layers[key]
        weight = torch.empty(0) if why_fixed(layer) else weight_of(layer)
        found[own[0]] = Matrix(own[0], f"{own[0]}.weight".removeprefix("."), weight, layer, tuple(own))
    return found | {stack.name: stack for stack in blocks if stack.name not in found}


def _blocks(model: Any) -> Iterator[Matrix]:
    """The matrices listed in the model's architecture file, if there is a file and it matches the model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text, "model_type", None) not in catalogue() and not getattr(text, "pliant_architecture", None):
        return
    try:
        anatomy = anatomy_of(model)
    except ArchitectureError:  # the layers differ from the file, for example because of an adapter
        return
    layers = layers_of(model, anatomy.source)
    names = {id(module): name for name, module in model.named_modules()}
    for block in anatomy.blocks.values():
        for weight in block.weights:
            if weight.reads is None:
                continue
            layer = layers[block.layer]
            prefix = names[id(layer)]
            path = f"{prefix}.{weight.path}" if prefix else weight.path
            tensor = weight.tensor(layer).detach().movedim(weight.reads, -1)
            yield Matrix(path.removesuffix(".weight"), path, tensor, called=weight.called)


def _named(everything: dict[str, Matrix], wanted: str | Sequence[str], setting: str) -> set[str]:
    """The names of the layers matched by a regular expression (whole names), or by names or name endings, as in
    peft."""
    chosen: set[str] = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        fits = {
            name
            for name, one in everything.items()
            if wanted == ALL or any(_fits(own, pattern, isinstance(wanted, str)) for own in one.names or (name,))
        }
        if not fits:
            how = "matches" if isinstance(wanted, str) else "is or ends with"
            like = next(iter(everything), None)
            raise StepError(f"{setting}: no linear layer's name {how} {pattern!r}; an existing name is {like!r}")
        chosen |= fits
    return chosen


def _fits(name: str, pattern: str, whole: bool) -> bool:
    return re.fullmatch(pattern, name) is not None if whole else name == pattern or name.endswith(f".{pattern}")


def _why_skipped(model: nn.Module, name: str, one: Matrix, replaces: bool) -> str:
    """Why a matrix cannot be changed, or its layer replaced; an empty string if it can."""
    if one.layer is None:
        owner = model.get_submodule(one.path.rpartition(".")[0])
        return _kind(owner, one.weight) if replaces else ""
    path = ""
    for part in ("", *name.split(".")[:-1]):
        path = f"{path}.{part}".strip(".")
        around: Any = model.get_submodule(path)
        if isinstance(around, torch.jit.ScriptModule):
            return "it belongs to a module that TorchScript has compiled"
        if is_compiled(around):
            return "it belongs to a module that torch.compile has compiled; compile it afterwards"
        if "base_layer" in dict(around.named_children()):
            return f"an adapter ({type(around).__name__}) is wrapped around it; merge it first"
    if "base_layer" in dict(one.layer.named_children()):
        return f"an adapter ({type(one.layer).__name__}) is wrapped around it; merge it first"
    if not replaces:
        return why_fixed(one.layer)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    partners = {
        *(v for k, v in tied.items() if k == f"{name}.weight"),
        *(k for k, v in tied.items() if v == f"{name}.weight"),
    }
    for partner in partners:
        if not isinstance(model.get_submodule(partner.rpartition(".")[0]), nn.Embedding):
            return f"transformers ties its weight to that of {partner.rpartition('.')[0]}"
    return why_kept(one.layer)


def _kind(module: nn.Module, parameter: torch.Tensor) -> str:
    """The kind of a parameter outside linear layers, in words."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embeddings"
    if parameter.dim() <= 1:
        return "norms, biases and other vectors"
    if isinstance(module, CONVOLUTIONS):
        return "convolutions"
    if parameter.dim() == 3:
        return "stacks of matrices outside linear layers, such as those of experts"
    return f"parameters of {type(module).__name__} outside linear layers"
