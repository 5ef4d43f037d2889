"""Replace linear layers with packed ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from pliant.checkpoint.packed_bytes import packed_bytes
from pliant.compat.native_check import run_natively
from pliant.compat.packed_layers import record_packed
from pliant.errors import PackedError, StepError
from pliant.pages import pages_of
from pliant.record import Note
from pliant.runtime.dense import is_linear, weight_of
from pliant.runtime.kv_blocks import Keeping
from pliant.runtime.packed_linear import Packed
from pliant.runtime.packed_matrix import FORMATS, GROUPS
from pliant.runtime.rounding_grid import round_to_grid
from pliant.runtime.sparse_break_even import pays
from pliant.step import Job
from pliant.step_setting import setting
from pliant.values.matrix import (
    Matrix,
    Selection,
    ValueStep,
    head_of,
    select_matrices,
    skipped_note,
    skipped_parameters,
)

CHOICES = ("auto", "dense", *FORMATS)
CACHES = ("bf16", "int8", "float32")
SPARSE = ("auto", "always", "never")


class PackedLinear(ValueStep):
    """Store linear layers as bf16, int8 or int4, leave zeros out where that is faster, and run them on pliant's CPU
    kernels.

    Any module with linear layers can be packed. Layers whose weight is read or wrapped by other code (an adapter, a
    parametrization) are skipped; the record lists them and their share of the model. Packing comes last: a packed model
    can be run, saved, loaded and measured, but no longer cut or trained. An error or Ctrl-C while layers are packed
    leaves the model unchanged.
    """

    packs: ClassVar[bool] = True

    format: str = setting(
        "Format of the layers: bf16, int8, int4, or auto: the smallest one that stores a layer without loss (int4 or "
        "int8 for weights that were rounded to such a grid, otherwise bf16).",
        default="auto",
        choices=CHOICES,
    )

    group: int = setting(
        "int4: inputs that share a scale: 128, 64 or 32. Smaller groups are more accurate and larger (4.125, 4.25 or "
        "4.5 bits per weight).",
        default=128,
        choices=GROUPS,
    )

    head: str = setting(
        "Format of the output head; dense leaves it as it is, auto takes the format of the other layers.",
        default="int8",
        choices=CHOICES,
    )

    rules: Mapping[str, str] = setting(
        "Other formats for some layers: a regular expression that is searched for in the layer's name, and a format, "
        "or dense to leave the layer as it is. The first match counts. On the command line: "
        "'down_proj=int8,layers.0.=bf16'.",
        factory=dict,
    )

    cache: str = setting(
        "Format of the cached keys and values of older tokens during generation: bf16, int8 or float32.",
        default="bf16",
        choices=CACHES,
    )

    key_sparsity: float = setting(
        "Share of these keys to zero: the smallest ones of every 64 tokens and head.",
        default=0.0,
        at_least=0,
        below=1,
    )

    value_sparsity: float = setting("The same for values.", default=0.0, at_least=0, below=1)

    sparse: str = setting(
        "Whether zeros are left out: always, never, or auto: in layers with so many zeros that it is faster on this "
        "machine.",
        default="auto",
        choices=SPARSE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rules, str):
            object.__setattr__(self, "rules", _parsed(self.rules))
        if not isinstance(self.rules, Mapping) or not all(isinstance(pattern, str) for pattern in self.rules):
            raise StepError(
                f"rules must map regular expressions to formats, such as {{'down_proj': 'int8'}}; not {self.rules!r}"
            )
        for pattern, format_ in self.rules.items():
            if format_ not in CHOICES:
                raise StepError(
                    f"rules: the format of {pattern!r} must be one of {', '.join(CHOICES)}; not {format_!r}"
                )
        try:
            Keeping(**self._cache())
        except PackedError as error:
            raise StepError(str(error)) from None
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise StepError(f"rules: {pattern!r} is not a valid regular expression: {error}") from None

    def _cache(self) -> dict[str, Any]:
        return {"format": self.cache, "key_sparsity": self.key_sparsity, "value_sparsity": self.value_sparsity}

    def select(self, model: Any) -> tuple[Selection, list[tuple[Matrix, str]]]:
        """The matrices that the step changes and those that it skips, and the format of each layer to pack.

        Raises:
            StepError: the model cannot be packed, or no layer is to be packed.
        """
        if pages_of(model) is not None:
            raise StepError("packed weights have to be in memory; load the model without a memory limit")
        if is_linear(model):
            raise StepError(
                f"a single {type(model).__name__} cannot be replaced in place; pack torch.nn.Sequential(layer) instead"
            )
        if any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters()):
            raise StepError("packed layers run on the CPU; move the model to the CPU first")
        found = select_matrices(
            model, self.target_modules, self.exclude_modules, replaces=True, head=self.head != "dense"
        )
        wanted = self._formats(found.matrices, head_of(model))
        dense = {one.name for one in found.matrices} - {one.name for one, _ in wanted}
        found.left |= dict.fromkeys(dense, "linear layers that format, head or rules leave dense")
        found.matrices = [one for one, _ in wanted]
        if not wanted:
            raise StepError("these settings pack none of the layers; change format, head or rules")
        return found, wanted

    @torch.no_grad()
    def run(self, job: Job) -> None:
        model = job.model
        found, wanted = self.select(model)
        layers: dict[str, dict[str, Any]] = {}
        made: list[Packed] = []
        packed: dict[tuple[Any, ...], torch.Tensor] = {}  # of weights that two layers share
        taken = {id(one.layer) for one, _ in wanted}
        stay = {id(p) for m in model.modules() if id(m) not in taken for p in m.parameters(recurse=False)}
        with job.progress.stage("packing") as shown:
            for done, (one, choice) in enumerate(wanted):
                shown.step(done / len(wanted), one.name)
                layer: Any = one.layer
                weight = weight_of(layer)
                form, group = _lossless(weight) if choice == "auto" else (choice, self.group)
                zeros = float((weight == 0).float().mean())
                sparse = self.sparse == "always" or (self.sparse == "auto" and zeros > 0 and pays(form, zeros))
                key = id(layer.weight), form, sparse, group
                made.append(Packed.of(layer, form, sparse=sparse, group=group, packed=packed.get(key)))
                made[-1].tied = id(layer.weight) in stay
                stay.add(id(layer.weight))
                packed[key] = made[-1].packed
                bits = made[-1].header().bits
                layers[one.name] = {"format": form, "sparse": sparse, "sparsity": zeros, "bits": bits}
        for (one, _), layer in zip(wanted, made, strict=True):  # only now: an interrupted packing has changed nothing
            for name in one.names:
                model.set_submodule(name, layer)
        record_packed(model, self._cache())
        own = isinstance(model, PreTrainedModel)
        why_not = run_natively(model) if own else "a plain module calls its layers itself"
        total = sum(one.in_features * one.out_features for one in made)
        stored = sum(one.packed.numel() for one in made)
        job.record.update(
            packed=layers,
            bits=8 * stored / total,
            bytes=packed_bytes(model),
            native=not why_not,
            why_not_native=why_not,
            left=skipped_parameters(model, found, sum(one.parameters_held() for one in made)),
        )
        show_packed(job)

    def _formats(self, layers: list[Matrix], head: tuple[str, nn.Module] | None) -> list[tuple[Matrix, str]]:
        """The layers and the format of each; ``dense`` for those to leave as they are."""
        choices = {one.name: self.format for one in layers}
        if head is not None and head[0] in choices:
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
                f"rules: no linear layer's name matches {unused[0]!r}; an existing name is "
                f"{next(iter(choices), None)!r}"
            )
        return [(one, choices[one.name]) for one in layers if choices[one.name] != "dense"]


def show_packed(job: Job) -> None:
    """Show the formats of the packed layers, and how the model runs."""
    record = job.record
    how = "all run in one native call" if record["native"] else f"run one by one: {record['why_not_native']}"
    forms = Counter(layer["format"] for layer in record["packed"].values())
    job.show(
        Note(f"Packed layers at {record['bits']:.2f} bits per weight, {how}."),
        *skipped_note(record["left"], "packed"),
        done=f"linear layers ({1 - record['left']['share']:.1%} of the parameters) packed as "
        + " and ".join(form for form, _ in forms.most_common()),
        tags=["quantized"],
    )


def _lossless(weight: torch.Tensor) -> tuple[str, int]:
    """The smallest format that stores these weights without loss, and its group; bf16, which rounds, if there is
    none."""
    dense = weight.float()
    for group in reversed(GROUPS):
        if torch.equal(round_to_grid(dense, 4, group).to(weight.dtype), weight):
            return "int4", group
    exact = torch.equal(round_to_grid(dense, 8, None).to(weight.dtype), weight)
    return ("int8" if exact else "bf16"), GROUPS[-1]


def _parsed(rules: str) -> dict[str, str]:
    pairs = [pair.rpartition("=") for pair in rules.split(",") if pair.strip()]
    if any(not pattern for pattern, _, _ in pairs):
        raise StepError(f"rules must be pattern=format, separated by commas; not {rules!r}")
    return {pattern.strip(): form.strip() for pattern, _, form in pairs}
