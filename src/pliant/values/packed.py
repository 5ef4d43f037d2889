"""Replace linear layers by packed ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from pliant.checkpoint.quantized import record_packed
from pliant.checkpoint.weights import check_finite
from pliant.compat.native import run_natively
from pliant.errors import PackedError
from pliant.pages import pages_of
from pliant.runtime.cache import Keeping
from pliant.runtime.grid import round_to_grid
from pliant.runtime.linear import Packed
from pliant.runtime.packed import FORMATS, GROUPS
from pliant.runtime.pays import pays
from pliant.step import Job, Step, StepError
from pliant.values.matrix import head_of, matrices

CHOICES = ("auto", "dense", *FORMATS)


@dataclass(frozen=True, kw_only=True)
class PackedLinear(Step):
    """Store linear layers as bf16, int8 or int4, leave zeros out where that is faster, and run them on pliant's CPU kernels.

    Packing comes last: a packed model is run, saved, loaded and measured, but not cut or trained any more.
    """

    kind: ClassVar[str] = "packed"
    reshapes: ClassVar[bool] = False

    format: str = "auto"
    """What the layers become: bf16, int8, int4, or auto: what holds their weights as they are in the fewest bits (int4 or int8
    for weights that were rounded to such a grid, otherwise bf16)."""

    group: int = 128
    """int4: inputs that share a scale: 128, 64 or 32. Fewer are more exact and take more room (4.125, 4.25, 4.5 bits)."""

    head: str = "int8"
    """The same for the output head, or dense to leave it; auto for what the other layers become."""

    rules: Mapping[str, str] = field(default_factory=dict)
    """Other formats for some layers: a regular expression that is looked for in the layer's name, and a format, or dense to
    leave it. The first that matches counts. On the command line: 'down_proj=int8,layers.0.=bf16'."""

    cache: str = "bf16"
    """What the keys and values of older tokens are kept as while the model generates: bf16, int8 or float32."""

    key_sparsity: float = 0.0
    """Share of these keys, the smallest of every 64 tokens and head, that is zeroed."""

    value_sparsity: float = 0.0
    """The same of values."""

    sparse: str = "auto"
    """Whether zeros are left out: always, never, or auto: where a layer has so many that it is faster on this machine."""

    def __post_init__(self) -> None:
        if isinstance(self.rules, str):
            object.__setattr__(self, "rules", _parsed(self.rules))
        for name, value in {"format": self.format, "head": self.head, **self.rules}.items():
            if value not in CHOICES:
                raise StepError(f"{name} is one of {', '.join(CHOICES)}, not {value!r}")
        if self.group not in GROUPS:
            raise StepError(f"group is one of {', '.join(map(str, GROUPS))}, not {self.group!r}")
        if self.sparse not in ("auto", "always", "never"):
            raise StepError(f"sparse is auto, always or never, not {self.sparse!r}")
        try:
            Keeping(**self._cache())
        except PackedError as error:
            raise StepError(str(error)) from None
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise StepError(f"{pattern!r} is no regular expression: {error}") from None

    def _cache(self) -> dict[str, Any]:
        return {"format": self.cache, "key_sparsity": self.key_sparsity, "value_sparsity": self.value_sparsity}

    @torch.no_grad()
    def run(self, job: Job) -> None:
        model = job.model
        if pages_of(model) is not None:
            raise StepError("packing keeps the packed weights in memory; load the model without a memory limit")
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise StepError("packed layers run on the CPU; load the model there")
        check_finite(model)
        wanted = self._wanted(model)
        if not wanted:
            raise StepError("none of the layers is packed by these settings")
        layers: dict[str, dict[str, Any]] = {}
        with job.progress.stage("packing") as shown:
            for done, (name, choice) in enumerate(wanted.items()):
                shown.step(done / len(wanted), name)
                layer = model.get_submodule(name)
                weight = weight_of(layer)
                form, group = _lossless(weight) if choice == "auto" else (choice, self.group)
                zeros = float((weight == 0).float().mean())
                sparse = self.sparse == "always" or (self.sparse == "auto" and zeros > 0 and pays(form, zeros))
                packed = Packed.of(layer, form, sparse=sparse, group=group)
                packed.tied = getattr(layer, "weight", None) is embedding_of(model)
                model.set_submodule(name, packed)
                found = packed.header()
                layers[name] = {"format": form, "sparse": sparse, "sparsity": zeros, "bits": found.bits}
        record_packed(model, self._cache())
        why_not = run_natively(model)
        weights = {name: model.get_submodule(name) for name in layers}
        total = sum(one.in_features * one.out_features for one in weights.values())
        stored = sum(one.weight.numel() for one in weights.values())
        job.record.update(
            packed=layers, bits=8 * stored / total, bytes=stored, native=not why_not, why_not_native=why_not
        )

    def _wanted(self, model: Any) -> dict[str, str]:
        """The layers to pack and what each becomes."""
        names = [matrix.name for matrix in matrices(model)]
        choices = {name: self.format for name in names if is_linear(_module(model, name))}
        if (head := head_of(model)) is not None and is_linear(head[1]):
            choices[head[0]] = self.format if self.head == "auto" else self.head
        used: set[str] = set()
        for name in choices:
            for pattern, choice in self.rules.items():
                if re.search(pattern, name):
                    choices[name] = choice
                    used.add(pattern)
                    break
        if unused := [pattern for pattern in self.rules if pattern not in used]:
            raise StepError(
                f"no linear layer's name has {unused[0]!r} in it; they are like {next(iter(choices), None)!r}"
            )
        return {name: choice for name, choice in choices.items() if choice != "dense"}


def is_linear(layer: nn.Module | None) -> bool:
    """Whether a layer can be packed: torch's ``Linear`` or transformers' ``Conv1D``."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def weight_of(layer: Any) -> torch.Tensor:
    """Shape ``(out, in)``."""
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T


def embedding_of(model: Any) -> torch.Tensor | None:
    """The weight of the input embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(embedding, "weight", None)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None  # a stack of experts is a parameter


def _lossless(weight: torch.Tensor) -> tuple[str, int]:
    """The format of fewest bits that holds these weights as they are, and its group; bf16, which rounds, where none does."""
    dense = weight.float()
    for group in reversed(GROUPS):
        if torch.equal(round_to_grid(dense, 4, group).to(weight.dtype), weight):
            return "int4", group
    exact = torch.equal(round_to_grid(dense, 8, None).to(weight.dtype), weight)
    return ("int8" if exact else "bf16"), GROUPS[-1]


def _parsed(rules: str) -> dict[str, str]:
    pairs = [pair.rpartition("=") for pair in rules.split(",") if pair.strip()]
    if any(not pattern for pattern, _, _ in pairs):
        raise StepError(f"rules are pattern=format, with commas between them; not {rules!r}")
    return {pattern.strip(): form.strip() for pattern, _, form in pairs}
