"""The trained parameters of a model: all of its weights, or low-rank adapters on linear layers.

Both keep the original weights until the end, so that a training that fails or is interrupted leaves the model
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from pliant.anatomy import Anatomy, layers_of, output_of, probe
from pliant.errors import MissingExtraError, StepError
from pliant.runtime.dense import is_linear, stored_in_out
from pliant.train.seeds import seeded

HALF = (torch.float16, torch.bfloat16)


class Full:
    """All parameters of the model. Those in half precision are trained in float32 and rounded once, at the end."""

    without: ClassVar[dict[str, str]] = {}

    def __init__(self, model: nn.Module):
        self.parameters = dict(model.named_parameters())
        self._given = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.float() if parameter.dtype in HALF else parameter.data.clone()
                parameter.requires_grad_()
        except BaseException:  # such as too little memory
            self.abandon()
            raise

    def finish(self) -> None:
        """Write the trained values into the model."""
        for name, parameter in self.parameters.items():
            parameter.data = parameter.data.to(self._given[name].dtype)

    def abandon(self) -> None:
        """Restore the model as it was given."""
        for name, parameter in self.parameters.items():
            parameter.data = self._given[name]


class Lora:
    """Low-rank adapters (Hu et al., 2021, arXiv 2106.09685) on linear layers of the blocks; the rest is frozen.

    Arguments:
        targets: names of linear layers, such as ``q_proj``; if empty, all that can have an adapter.
        seed: of the initial values of the adapters.

    Attributes:
        without: name of a linear layer that cannot have an adapter -> the reason.

    Raises:
        MissingExtraError: peft is not installed.
        StepError: a target is not in the model, or cannot have an adapter.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str],
        seed: int,
    ):
        try:
            import peft
        except ImportError:
            raise MissingExtraError(
                "method lora needs peft: pip install 'pliant[train]'; or choose method full"
            ) from None
        self._model = model
        with seeded(model.device, seed):
            self.without = _without_adapters(model, anatomy)
        possible = sorted({_name(path) for path in linear_layers(model, anatomy)} - self.without.keys())
        if wrong := [name for name in targets if name in self.without]:
            raise StepError(
                f"target_modules: {wrong[0]} of this model cannot have an adapter: {self.without[wrong[0]]}; choose "
                f"from: {', '.join(possible)}"
            )
        if not possible:
            raise StepError("no linear layer in the blocks of this model can have an adapter; choose method full")
        self._linears = linear_layers(model, anatomy, targets or possible)
        self._given: dict[str, torch.Tensor] = {}
        settings = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do
            lora_dropout=dropout,
            target_modules=list(self._linears),
            fan_in_fan_out=any(map(stored_in_out, self._linears.values())),
        )
        try:
            with seeded(model.device, seed):
                # not get_peft_model: what that wraps around is for saving and generating
                self._wrapped: Any = peft.LoraModel(model, settings, "default")
        except BaseException as error:
            self.abandon()
            if isinstance(error, ValueError):
                raise StepError(
                    f"peft cannot put adapters on this model: {str(error).rstrip('.')}; choose other target_modules, "
                    "or method full"
                ) from error
            raise
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float() if parameter.dtype in HALF else parameter.data

    def finish(self) -> None:
        """Merge the trained adapters into the weights."""
        # the merge adds to the weights in place; a copy takes it, so that an interrupted merge can be undone
        self._given = {path: linear.weight.data for path, linear in self._linears.items()}
        for linear in self._linears.values():
            linear.weight.data = linear.weight.data.clone()
        self._wrapped.merge_and_unload()

    def abandon(self) -> None:
        """Restore the model as it was given."""
        for path, linear in self._linears.items():
            linear.weight.data = self._given.get(path, linear.weight.data)
            self._model.set_submodule(path, linear)
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config


def _name(path: str) -> str:
    return path.rpartition(".")[2]


@torch.no_grad()
def _without_adapters(model: Any, anatomy: Anatomy) -> dict[str, str]:
    """The names of linear layers that cannot have an adapter, each with the reason.

    Code may read the weight of a layer and never call it, as the mixers of Mamba do. An adapter on it would have no
    effect until it is merged. peft refuses such layers of some models by their names. If several layers share a weight,
    each would merge an adapter of its own into it.
    """
    import peft

    linears = linear_layers(model, anatomy)
    shared = {w.path.rpartition(".")[0] for b in anatomy.blocks.values() for w in b.weights if w.tied}
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path)) for path, module in linears.items()
    ]
    try:
        output_of(model, probe(model))
    finally:
        for handle in handles:
            handle.remove()
    reasons = {_name(path): "the model reads its weight and never calls it" for path in linears if path not in called}
    reasons |= {_name(path): "several layers share its weight" for path in shared}
    for name in {_name(path) for path in linears} - reasons.keys():
        alone: Any = nn.Module()
        alone.config = model.config
        alone.add_module(name, nn.Linear(1, 1))
        try:
            peft.LoraModel(alone, peft.LoraConfig(r=1, target_modules=[name]), "default")
        except ValueError:
            reasons[name] = f"peft refuses it in a {model.config.model_type}"
    return dict(sorted(reasons.items()))


def linear_layers(model: nn.Module, anatomy: Anatomy, targets: Sequence[str] = ()) -> dict[str, Any]:
    """The linear layers in the blocks of a model that have weights, by full path.

    Arguments:
        targets: names of the layers to take; if empty, all.

    Raises:
        StepError: no linear layer has one of the names.
    """
    layers = layers_of(model, anatomy.source)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, Any] = {}
    for block in anatomy.blocks.values():
        for weight in block.weights:
            path = weight.path.removesuffix(".weight")
            module: Any = layers[block.layer].get_submodule(path) if path != weight.path else None
            if is_linear(module) and module.weight.numel():  # a removed scan leaves a matrix without rows
                found[f"{prefix}.{block.layer}.{path}"] = module
    names = sorted({path.rpartition(".")[2] for path in found})
    for target in targets:
        if target not in names:
            raise StepError(f"target_modules: unknown linear layer {target!r}; choose from: {', '.join(names)}")
    return {path: module for path, module in found.items() if not targets or path.rpartition(".")[2] in targets}


@contextmanager
def training_mode(model: Any, *, recompute: bool) -> Iterator[None]:
    """While inside, the model is in training mode and its parameters are frozen. Afterwards every flag is as before.

    Arguments:
        recompute: keep only the hidden states between layers, and recompute the rest for the gradients.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointing = recompute and not on
    try:
        model.requires_grad_(False)
        model.train()
        if checkpointing:
            _checkpointing(model, "enable")({"use_reentrant": False})
        yield
    finally:
        if checkpointing:
            _checkpointing(model, "disable")()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _checkpointing(model: Any, verb: str) -> Any:
    """transformers renames these methods: the old name warns from 5.23 on, the new one does not exist in 5.14."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
