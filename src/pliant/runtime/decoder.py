"""Run all layers of a Llama-like decoder in one native call.

Between the matrix products of a small model, eager PyTorch spends several times what these take. A decoder whose linear layers
are packed and whose blocks are of the common kind (RMS norms, rotary positions, gated MLP) is run natively as a whole, after
a check that it computes the same; any other keeps its own code and uses the packed layers one by one.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from pliant.runtime.cache import BlockLayer, Keeping, per_token
from pliant.runtime.library import library
from pliant.runtime.linear import Packed
from pliant.runtime.packed import check
from pliant.runtime.threads import threads, torch_on_all, torch_on_one

ACTIVATIONS = {"silu": 1, "swish": 1, "gelu": 2, "gelu_pytorch_tanh": 3, "gelu_new": 3, "relu": 4}
NUDGE = 1e-6  # what rounding does; 8-bit activations make more of it, so it is measured how much
AGREEMENT = 1e-3  # of hidden states, beside that
OTHERS = {  # arguments of generate that bring code along, which may have much to do
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "custom_generate",
}
_P, _L = ctypes.c_void_p, ctypes.c_int64


class _Projection(ctypes.Structure):
    _fields_ = (("data", _P), ("size", _L), ("bias", _P))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _P) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _L) for name in ("heads", "kv_heads", "window", "rotary")),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, _L) for name in ("hidden", "width", "activation")),
        *((name, ctypes.c_double) for name in ("epsilon", "scale")),
        ("final_norm", _P),
    )


class _UnlikeError(Exception):
    """A model is not of the kind that is run natively, and why."""


@dataclass(eq=False)
class Decoder:
    """The layers of a base model, as the native side knows them.

    Attributes:
        handle: of the native object.
        heads: key-value heads of each layer, 0 where attention was removed.
        width: elements of a head.
        slots: where each layer keeps its tokens in a cache.
        held: tensors that the native side points into.
        spent: nanoseconds in matrix products and in attention, since it was last set to 0.
    """

    handle: int
    heads: list[int]
    width: int
    slots: list[int]
    held: list[torch.Tensor]
    spent: Any = field(default_factory=lambda: (_L * 2)())

    def run(self, stream: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, layers: list[BlockLayer]) -> None:
        """One pass over new tokens, in place.

        Arguments:
            stream: embeddings in, the normed hidden state out; shape ``(tokens, hidden)``, float32.
            cosine, sine: of the rotary positions, shape ``(tokens, rotated)``, float32.
            layers: one cache for every layer.
        """
        native: Any = library()
        caches = (_P * len(layers))(
            *(
                layer.open(1, heads, self.width) if heads else None
                for layer, heads in zip(layers, self.heads, strict=True)
            )
        )
        native.pliant_decoder_run(
            self.handle,
            stream.data_ptr(),
            stream.shape[0],
            cosine.data_ptr(),
            sine.data_ptr(),
            cosine.shape[-1],
            caches,
            threads(),
            self.spent,
        )


class Native:
    """What is put before a base model's own class: its forward pass in one native call, where that can be."""

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Shape ``(batch, tokens)`` of ids, or ``(batch, tokens, hidden)`` of embeddings."""
        layer_by_layer = functools.partial(
            super().forward,  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if torch.compiler.is_compiling():
            return layer_by_layer()

        def stock() -> Any:
            with torch_on_all():
                return layer_by_layer()

        given = input_ids if inputs_embeds is None else inputs_embeds
        extras = ("output_attentions", "output_hidden_states")
        asks_more = any(kwargs.get(name, getattr(self.config, name, False)) for name in extras)
        asks_more = asks_more or kwargs.get("return_dict") is False or kwargs.get("cu_seq_lens_q") is not None
        if torch.is_grad_enabled() or given is None or asks_more:
            return stock()
        if given.device.type != "cpu" or (attention_mask is not None and not _sees_all(attention_mask)):
            return stock()
        keeps = use_cache if use_cache is not None else self.config.use_cache
        if keeps and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and (given.shape[0] != 1 or not _in_blocks(past_key_values, self)):
            return stock()
        decoder = decoder_of(self)
        if decoder is None:
            return stock()
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(before, before + embeds.shape[1]).unsqueeze(0)
        cosine, sine = (table.float().contiguous() for table in self.rotary_emb(embeds, position_ids))
        stream = embeds.float().clone() if embeds.dtype == torch.float32 else embeds.float()
        stream = stream.contiguous()
        for row in range(stream.shape[0]):
            layers = [BlockLayer() for _ in decoder.slots]
            if past_key_values is not None:
                layers = [past_key_values.layers[slot] for slot in decoder.slots]
            own = min(row, cosine.shape[0] - 1)
            decoder.run(stream[row], cosine[own], sine[own], layers)
        return BaseModelOutputWithPast(
            last_hidden_state=stream.to(embeds.dtype),  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values if keeps else None,
        )

    def __reduce__(self: Any) -> Any:
        """A copy, or what is unpickled, makes a native decoder of its own."""
        state = {name: value for name, value in vars(self).items() if name != "_pliant_decoder"}
        return _empty, (type(self).__mro__[2],), state

    def __reduce_ex__(self, _: Any) -> Any:
        return self.__reduce__()


@functools.cache
def native_class(own: type) -> type:
    """A base model's class that runs natively where it can."""
    return type(own.__name__, (Native, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def _empty(own: type) -> Any:
    return object.__new__(native_class(own))


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``generate``, on one thread where all that does much is native."""
    generate = functools.partial(type(model).generate, model, *args, **kwargs)
    others = len(args) > 2 or any(kwargs.get(name) is not None for name in OTHERS) or "forward" in vars(model)
    if others or not isinstance(model.get_output_embeddings(), Packed) or threads() == 1:
        return generate()
    with torch_on_one():
        return generate()


def run_natively(model: nn.Module) -> str:
    """Have the base of a packed model run natively, if it is of the kind that can be.

    Returns:
        Why not, or nothing.
    """
    base: Any = getattr(model, "base_model", model)
    if library() is None:
        return "there are no kernels"
    if isinstance(base, Native):
        return ""
    own = type(base)
    try:
        decoder = _build(base)
    except _UnlikeError as reason:
        return str(reason)
    except AttributeError as missing:
        return f"its layers are not laid out as llama's are: {missing}"
    was_training = base.training
    base.eval()
    agrees, off = False, float("nan")
    try:
        with torch.inference_mode():
            ids = torch.arange(16).view(1, -1) * 97 % base.embed_tokens.weight.shape[0]
            embeds = base.embed_tokens(ids)
            expected = base(inputs_embeds=embeds, use_cache=False).last_hidden_state
            nudged = base(inputs_embeds=embeds * (1 + NUDGE), use_cache=False).last_hidden_state
            base.__class__ = native_class(own)
            base._pliant_decoder = decoder
            found = base(inputs_embeds=embeds, use_cache=False).last_hidden_state
            off = _apart(found, expected)
            agrees = off <= AGREEMENT + 3 * _apart(nudged, expected)
    finally:
        base.train(was_training)
        if not agrees:
            base.__class__ = own
            vars(base).pop("_pliant_decoder", None)
    if agrees and model is not base and hasattr(model, "generate"):
        vars(model)["generate"] = functools.partial(_generate, model)
    return "" if agrees else f"its layers compute something else: {off:.1%} off"


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far apart hidden states are at the median token, relative to their size."""
    return float(((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).median())


def decoder_of(base: Any) -> Decoder | None:
    """The native decoder of a base model, made again where a copy of the model came without."""
    found = vars(base).get("_pliant_decoder")
    if found is None:
        try:
            found = base._pliant_decoder = _build(base)
        except (_UnlikeError, AttributeError):
            return None
    return found


def _sees_all(mask: torch.Tensor) -> bool:
    return mask.dim() == 2 and bool(mask.all())


def _in_blocks(cache: Any, base: Any) -> bool:
    """Whether a cache keeps blocks; an empty dynamic one, as ``generate`` makes it, is made to, as the model's config says."""
    layers = cache.layers
    if layers and all(type(layer) is BlockLayer for layer in layers):
        return True
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if type(cache) is not DynamicCache or not layers or not plain or cache.get_seq_length():
        return False
    keeping = _keeping(base)
    layers[:] = [BlockLayer(keeping) for _ in layers]
    return True


def _keeping(base: Any) -> Keeping:
    """How the caches that a model makes itself keep their tokens."""
    return Keeping(**getattr(getattr(base.config, "quantization_config", None), "cache", {}))


def cached_bytes(model: nn.Module) -> int | None:
    """Bytes that a token takes in the cache of a model that runs natively, once it is packed; None for any other."""
    base: Any = getattr(model, "base_model", model)
    decoder = decoder_of(base) if isinstance(base, Native) else None
    if decoder is None:
        return None
    return round(sum(per_token(_keeping(base), heads, decoder.width) for heads in decoder.heads if heads))


def _build(base: Any) -> Decoder:
    """Read the layers of a base model.

    Raises:
        _UnlikeError: they are of another kind.
    """
    config = base.config
    if config.hidden_act not in ACTIVATIONS:
        raise _UnlikeError(f"its activation is {config.hidden_act}")
    held: list[torch.Tensor] = []

    def floats(tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        held.append(tensor.detach().float().contiguous())
        return held[-1].data_ptr()

    def projection(layer: Any) -> _Projection:
        if not isinstance(layer, Packed):
            raise _UnlikeError("not all of its linear layers are packed")
        held.append(layer.packed)
        return _Projection(layer.packed.data_ptr(), layer.packed.numel(), floats(layer.bias))

    attentions = [layer.self_attn for layer in base.layers if _has_packed(layer.self_attn)]
    if not attentions:
        raise _UnlikeError("it has no attention")
    width, scale = attentions[0].head_dim, attentions[0].scaling
    if any((one.head_dim, one.scaling) != (width, scale) for one in attentions):
        raise _UnlikeError("its layers have heads of different widths")
    norm = base.norm
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    native: Any = library()
    plan = _Plan(config.hidden_size, width, ACTIVATIONS[config.hidden_act], epsilon, scale, floats(norm.weight))
    handle = native.pliant_decoder_new(ctypes.byref(plan))
    heads, slots = [], []
    try:
        for index, layer in enumerate(base.layers):
            one = _Layer()
            attention, mlp = layer.self_attn, layer.mlp
            slots.append(getattr(attention, "layer_idx", index))
            heads.append(0)
            if _has_packed(attention):
                for name in ("q", "k", "v", "o"):
                    setattr(one, name, projection(getattr(attention, f"{name}_proj")))
                one.attention_norm = floats(layer.input_layernorm.weight)
                one.heads = attention.q_proj.out_features // width
                one.kv_heads = heads[-1] = attention.k_proj.out_features // width
                one.q_norm = floats(getattr(getattr(attention, "q_norm", None), "weight", None))
                one.k_norm = floats(getattr(getattr(attention, "k_norm", None), "weight", None))
                one.window = _window(attention, config, index)
                one.rotary = bool(getattr(attention, "use_rope", True))
            if _has_packed(mlp):
                for name in ("gate", "up", "down"):
                    setattr(one, name, projection(getattr(mlp, f"{name}_proj")))
                one.mlp_norm = floats(layer.post_attention_layernorm.weight)
            check(native.pliant_decoder_add(handle, ctypes.byref(one)))
    except BaseException:
        native.pliant_decoder_end(handle)
        raise
    decoder = Decoder(handle, heads, width, slots, held)
    weakref.finalize(decoder, native.pliant_decoder_end, handle)
    return decoder


def _window(attention: Any, config: Any, index: int) -> int:
    """Tokens that a token of a layer sees, 0 for all: as its attention says, or else the config."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    types = getattr(config, "layer_types", None)
    slides = types is None or types[index] == "sliding_attention"
    return (getattr(config, "sliding_window", None) or 0) if slides else 0


def _has_packed(block: nn.Module) -> bool:
    """False for a block that was removed."""
    return any(isinstance(module, Packed) for module in block.modules())
