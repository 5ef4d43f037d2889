"""Build the native decoder of a transformers model from its architecture file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from pliant.anatomy import Anatomy, Block, anatomy_of, described_by, layers_of, plain_config
from pliant.architecture import NativeSpec
from pliant.compat.watch import Watch
from pliant.runtime.decoder import ACTIVATIONS, Decoder, Layer, decoder
from pliant.runtime.packed_linear import Packed

ROPE = {  # keys of rope_parameters that only affect the angles from the model's rotary module
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("truncate", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_factor"),
    *("long_factor", "low_freq_factor", "high_freq_factor"),
}
CONFIG = {  # config keys that change nothing here, or whose effect is read from the modules
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("pretraining_tp", "rope_parameters", "attention_bias", "mlp_bias", "attention_dropout", "use_sliding_window"),
    *("sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval"),
    *("ignore_keys_at_rope_validation",),
}


class UnlikeError(Exception):
    """A model cannot run natively, or no longer can; the message says why."""


@dataclass(frozen=True)
class NativePlan:
    """A native decoder and the information needed to call it.

    Attributes:
        slots: the cache slot of each layer; None for a layer without attention.
        words: the paths of the parts outside the layers.
    """

    decoder: Decoder
    slots: list[int | None]
    words: NativeSpec


def watch_of(base: Any) -> Watch:
    """A watch over all modules of a base model that a native run replaces.

    Raises:
        UnlikeError: its family has no native run.
    """
    words = described_by(base.config).native
    if words is None or base.config.model_type not in words.models:
        raise UnlikeError(f"{base.config.model_type} is not one of the families with a native run")
    called = {id(module) for path in (words.embedding, words.rotary) for module in base.get_submodule(path).modules()}
    return Watch([m for m in base.modules() if m is not base and id(m) not in called], [base], base.config)


def read_plan(base: Any, watch: Watch) -> NativePlan:
    """The native decoder of a base model's current layers.

    Raises:
        UnlikeError, pliant.PliantError: native runs do not support the layers.
    """
    if (foreign := watch.foreign()) != "":
        raise UnlikeError(foreign)
    anatomy = anatomy_of(base)
    words: Any = anatomy.architecture.native
    config = plain_config(base.config)
    _refuse_config(config, watch)
    activation = watch.setting(words.activation)
    if activation not in ACTIVATIONS:
        raise UnlikeError(f"its activation is {activation!r}, which native runs do not support")
    if name := watch.functions(type(base)):
        raise UnlikeError(f"{name} of its modeling file was replaced")
    norms = _Norms(base.get_submodule(words.norm), watch)
    stack = layers_of(base, anatomy.architecture)
    reader = _Reader(anatomy, words, words.models[config.model_type], norms, watch)
    layers = [reader.layer(layer, index) for index, layer in enumerate(stack)]
    if reader.width is None:
        raise UnlikeError("it has no attention")
    slots = [slot for slot in reader.slots if slot is not None]
    if len(set(slots)) < len(slots):
        raise UnlikeError("two of its layers share an entry of the cache")
    made = decoder(
        layers,
        hidden=config.hidden_size,
        width=reader.width,
        activation=activation,
        epsilon=norms.epsilon,
        scale=reader.scale,
        final_norm=norms.final,
    )
    watch.settle()
    return NativePlan(made, reader.slots, words)


def _refuse_config(config: Any, watch: Watch) -> None:
    """Raise if a config key could change the computation and is not known."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    for key in sorted({field.name for field in dataclasses.fields(config)} - common - CONFIG):
        value = getattr(config, key, None)
        watch.setting(key)
        if value not in (None, False, getattr(type(config), key, None)):
            raise UnlikeError(f"its config has {key}={value!r}, which native runs do not support")
    watch.setting("rope_parameters")
    rope = getattr(config, "rope_parameters", None) or {}
    if unknown := sorted(set(rope) - ROPE):
        raise UnlikeError(f"its rope_parameters have {unknown[0]!r}, which native runs do not support")
    watch.setting("is_causal")
    if getattr(config, "is_causal", None) is False:
        raise UnlikeError("its attention is not causal")


class _Norms:
    """Reader of a model's norms, which must be RMS norms of one class and one epsilon."""

    def __init__(self, final: nn.Module, watch: Watch):
        self.kind, self.watch = type(final), watch
        self.epsilon = self._epsilon(final)
        self.final = self.weight(final)

    def weight(self, norm: nn.Module) -> torch.Tensor:
        """The weight of a norm, shape ``(hidden,)``, or ``(width,)`` for a norm over heads."""
        if not self.kind.__module__.startswith("transformers.models."):
            raise UnlikeError(f"its norms are of class {self.kind.__name__}, which native runs do not support")
        if type(norm) is not self.kind or self._epsilon(norm) != self.epsilon:
            raise UnlikeError("its norms differ in class or epsilon")
        weight: Any = norm.weight
        return weight.detach()

    def _epsilon(self, norm: nn.Module) -> float:
        values = [self.watch.read(norm, key) for key in ("variance_epsilon", "eps")]
        return next((value for value in values if value is not None), float("nan"))


class _Reader:
    def __init__(self, anatomy: Anatomy, words: NativeSpec, kind: Mapping[str, str], norms: _Norms, watch: Watch):
        self.anatomy, self.words, self.kind, self.norms, self.watch = anatomy, words, kind, norms, watch
        self.width: int | None = None
        self.scale = float("nan")
        self.slots: list[int | None] = []

    def layer(self, layer: nn.Module, index: int) -> Layer:
        """Read one layer.

        Raises:
            UnlikeError: a native run does not support it.
        """
        fields: dict[str, Any] = {"packed": {}, "norms": {}}
        self.slots.append(None)
        for spec in self.anatomy.specs(index):
            block = self.anatomy.blocks.get(f"layers.{index}.{spec.kind}")
            if block is None:
                continue
            modules = {role: layer.get_submodule(spec.prefix + path) for role, path in spec.roles.items()}
            packed = {role: module for role, module in modules.items() if not role.endswith("_norm")}
            if not all(isinstance(module, Packed) for module in packed.values()) or not spec.roles:
                raise UnlikeError("not all of its linear layers are packed")
            fields["packed"] |= packed
            fields["norms"] |= {r: self.norms.weight(module) for r, module in modules.items() if r.endswith("_norm")}
            name = "attention_norm" if "q" in packed else "mlp_norm"
            fields["norms"][name] = self.norms.weight(layer.get_submodule(spec.norms[0]))
            if "q" in packed:
                fields |= self._attention(layer, layer.get_submodule(spec.module), block, index)
            else:
                self._check_activation(layer.get_submodule(spec.module), modules)
        return Layer(**fields)

    def _check_activation(self, mlp: nn.Module, weights: Mapping[str, nn.Module]) -> None:
        """Raise unless the rest of an MLP is the activation that the config names."""
        others = [child for child in mlp.children() if all(child is not weight for weight in weights.values())]
        expected = type(ACT2FN[self.watch.setting(self.words.activation)])
        if [*map(type, others)] != [expected]:
            names = ", ".join(type(other).__name__ for other in others) or "no activation"
            raise UnlikeError(f"its MLP has {names}, not a {expected.__name__}")

    def _attention(self, layer: nn.Module, attention: nn.Module, block: Block, index: int) -> dict[str, Any]:
        heads, kv_heads = (
            block.axes[block.spec.weights[block.spec.roles[role]][0][0].axis]  # pyright: ignore[reportOptionalSubscript]
            for role in ("q", "k")
        )
        scale = self.watch.read(attention, self.words.scale)
        if self.width is None:
            self.width, self.scale = heads.unit, scale
        if scale is None or (heads.unit, scale) != (self.width, self.scale):
            raise UnlikeError("its layers have heads of different widths or scales")
        if self.watch.read(attention, "is_causal") is False:
            raise UnlikeError("its attention is not causal")
        slot = None if block.spec.slot is None else self.watch.read(attention, block.spec.slot)
        self.slots[-1] = index if slot is None else slot
        rotates = self.kind.get("rotates")
        return {
            "heads": heads.size,
            "kv_heads": kv_heads.size,
            "window": self._window(layer, attention, index),
            "rotates": rotates is None or bool(self.watch.read(attention, rotates)),
        }

    def _window(self, layer: nn.Module, attention: nn.Module, index: int) -> int:
        """Number of tokens that a token attends to, 0 for all: the attention, its layer and the config have to
        agree."""
        where = self.kind.get("window")
        if where is None:
            return 0
        if where.startswith("config."):
            return self.watch.setting(where.removeprefix("config.")) or 0
        own = self.watch.read(attention, where) or 0
        size, kinds = self.watch.setting("sliding_window"), self.watch.setting("layer_types")
        kind = kinds[index] if kinds else "full_attention"
        masked = (size or 0) if kind == "sliding_attention" else 0
        if own != masked or self.watch.read(layer, "attention_type") not in (None, kind):
            raise UnlikeError("its config and its attention disagree about the sliding window")
        return own
