"""Replace linear layers by packed ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from pliant.checkpoint.packed_bytes import packed_bytes
from pliant.compat.native import run_natively
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
from pliant.step import Job, setting
from pliant.values.matrix import Matrix, ValueStep, concerned, head_of, left_note, left_over

CHOICES = ("auto", "dense", *FORMATS)
CACHES = ("bf16", "int8", "float32")
SPARSE = ("auto", "always", "never")


class PackedLinear(ValueStep):
    """Store linear layers as bf16, int8 or int4, leave zeros out where that is faster, and run them on pliant's CPU kernels.

    Any module with linear layers can be packed. Layers whose weight is read or wrapped by other code (an adapter, a parametrization)
    are skipped; the record lists them and their share of the model. Packing comes last: a packed model can be run, saved, loaded
    and measured, but no longer cut or trained.
    """

    kind: ClassVar[str] = "packed"

    packs: ClassVar[bool] = True

    format: str = setting(
        "What the layers become: bf16, int8, int4, or auto: what holds their weights as they are in the "
        "fewest bits (int4 or int8 for weights that were rounded to such a grid, otherwise bf16).",
        default="auto",
        choices=CHOICES,
    )

    group: int = setting(
        "int4: inputs that share a scale: 128, 64 or 32. Fewer are more exact and take more room (4.125, "
        "4.25, 4.5 bits).",
        default=128,
        choices=GROUPS,
    )

    head: str = setting(
        "The same for the output head, or dense to leave it; auto for what the other layers become.",
        default="int8",
        choices=CHOICES,
    )

    rules: Mapping[str, str] = setting(
        "Other formats for some layers: a regular expression that is looked for in the layer's name, and "
        "a format, or dense to leave it. The first that matches counts. On the command line: "
        "'down_proj=int8,layers.0.=bf16'.",
        factory=dict,
    )

    cache: str = setting(
        "What the keys and values of older tokens are kept as while the model generates: bf16, int8 or float32.",
        default="bf16",
        choices=CACHES,
    )

    key_sparsity: float = setting(
        "Share of these keys, the smallest of every 64 tokens and head, that is zeroed.",
        default=0.0,
        at_least=0,
        below=1,
    )

    value_sparsity: float = setting("The same of values.", default=0.0, at_least=0, below=1)

    sparse: str = setting(
        "Whether zeros are left out: always, never, or auto: where a layer has so many that it is faster "
        "on this machine.",
        default="auto",
        choices=SPARSE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rules, str):
            object.__setattr__(self, "rules", _parsed(self.rules))
        if not isinstance(self.rules, Mapping) or not all(isinstance(pattern, str) for pattern in self.rules):
            raise StepError(
                f"rules map regular expressions to formats, such as {{'down_proj': 'int8'}}; not {self.rules!r}"
            )
        for pattern, format_ in self.rules.items():
            if format_ not in CHOICES:
                raise StepError(f"{pattern} must be one of {', '.join(CHOICES)}; not {format_!r}")
        try:
            Keeping(**self._cache())
        except PackedError as error:
            raise StepError(str(error)) from None
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise StepError(f"{pattern!r} is not a valid regular expression: {error}") from None

    def _cache(self) -> dict[str, Any]:
        return {"format": self.cache, "key_sparsity": self.key_sparsity, "value_sparsity": self.value_sparsity}

    @torch.no_grad()
    def run(self, job: Job) -> None:
        model = job.model
        if pages_of(model) is not None:
            raise StepError("packing keeps the packed weights in memory; load the model without a memory limit")
        if is_linear(model):
            raise StepError(
                f"a single {type(model).__name__} cannot be replaced in place; pack torch.nn.Sequential(layer)"
            )
        if any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters()):
            raise StepError("packed layers run on the CPU; load the model there")
        found = concerned(model, self.target_modules, self.exclude_modules, replaces=True, head=self.head != "dense")
        wanted = self._formats(found.matrices, head_of(model))
        dense = {one.name for one in found.matrices} - {one.name for one, _ in wanted}
        found.left |= dict.fromkeys(dense, "linear layers that format, head or rules leave dense")
        found.matrices = [one for one, _ in wanted]
        if not wanted:
            raise StepError("none of the layers is packed by these settings")
        layers: dict[str, dict[str, Any]] = {}
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
                made = Packed.of(layer, form, sparse=sparse, group=group, packed=packed.get(key))
                made.tied = id(layer.weight) in stay
                stay.add(id(layer.weight))
                packed[key] = made.packed
                for name in one.names:
                    model.set_submodule(name, made)
                head = made.header()
                layers[one.name] = {"format": form, "sparse": sparse, "sparsity": zeros, "bits": head.bits}
        record_packed(model, self._cache())
        own = isinstance(model, PreTrainedModel)
        why_not = run_natively(model) if own else "a plain module calls its layers itself"
        weights = [model.get_submodule(name) for name in layers]
        total = sum(one.in_features * one.out_features for one in weights)
        stored = sum(one.packed.numel() for one in weights)
        job.record.update(
            packed=layers,
            bits=8 * stored / total,
            bytes=packed_bytes(model),
            native=not why_not,
            why_not_native=why_not,
            left=left_over(model, found, sum(one.parameters_held() for one in weights)),
        )
        show_packed(job)

    def _formats(self, layers: list[Matrix], head: tuple[str, nn.Module] | None) -> list[tuple[Matrix, str]]:
        """The layers to pack and what each becomes."""
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
                f"no linear layer's name has {unused[0]!r} in it; they are like {next(iter(choices), None)!r}"
            )
        return [(one, choices[one.name]) for one in layers if choices[one.name] != "dense"]


def show_packed(job: Job) -> None:
    """Show what was packed as what, and how the model runs."""
    record = job.record
    how = "all run in one native call" if record["native"] else f"run one by one: {record['why_not_native']}"
    forms = Counter(layer["format"] for layer in record["packed"].values())
    job.show(
        Note(f"Packed layers at {record['bits']:.2f} bits per weight, {how}."),
        *left_note(record["left"], "packed"),
        done=f"linear layers ({1 - record['left']['share']:.1%} of the parameters) packed as "
        + " and ".join(form for form, _ in forms.most_common()),
        tags=["quantized"],
    )


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
