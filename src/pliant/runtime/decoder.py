"""Run all layers of a Llama-like decoder in one native call.

Eager PyTorch spends several times as long between the matrix products of a small model as in them. Here layers are
packed matrices and vectors; :mod:`pliant.compat.native` decides which models they can replace.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pliant.errors import PackedError
from pliant.runtime.kv_blocks import Blocks
from pliant.runtime.library import library
from pliant.runtime.packed_linear import TYPES, Packed
from pliant.runtime.packed_matrix import check
from pliant.runtime.threads import threads

ACTIVATIONS = {"silu": 1, "swish": 1, "gelu": 2, "gelu_pytorch_tanh": 3, "gelu_new": 3, "relu": 4}
_P, _L = ctypes.c_void_p, ctypes.c_int64


class _Vector(ctypes.Structure):
    _fields_ = (("data", _P), ("type", _L))


class _Projection(ctypes.Structure):
    _fields_ = (("data", _P), ("size", _L), ("bias", _Vector))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Vector) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _L) for name in ("heads", "kv_heads", "window", "rotary")),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, _L) for name in ("hidden", "width", "activation")),
        *((name, ctypes.c_double) for name in ("epsilon", "scale")),
        ("final_norm", _Vector),
    )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer. A removed block has no matrices.

    Attributes:
        packed: role (``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``) -> packed layer.
        norms: ``attention_norm`` and ``mlp_norm``, shape ``(hidden,)``; ``q_norm`` and ``k_norm``, shape ``(width,)``,
            in layers that have them.
        heads, kv_heads: numbers of query heads and of key-value heads.
        window: number of tokens that a token attends to, 0 for all.
        rotates: whether its attention applies rotary positions.
    """

    packed: Mapping[str, Packed]
    norms: Mapping[str, torch.Tensor]
    heads: int = 0
    kv_heads: int = 0
    window: int = 0
    rotates: bool = True


@dataclass(eq=False)
class Decoder:
    """The layers of a model in the native library, which reads their tensors in place.

    Attributes:
        handle: of the native object.
        heads: key-value heads of each layer, 0 if attention was removed.
        width: elements of a head.
        held: tensors that the native side points into.
        spent: nanoseconds in matrix products and in attention, since it was last set to 0.
        runs: number of passes so far.
    """

    handle: int
    heads: list[int]
    width: int
    held: list[torch.Tensor]
    spent: Any = field(default_factory=lambda: (_L * 2)())
    runs: int = 0

    def run(
        self, stream: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, caches: Sequence[Blocks | None]
    ) -> bool:
        """One pass over new tokens, in place.

        Arguments:
            stream: embeddings in, the normed hidden state out; shape ``(tokens, hidden)``, float32.
            cosine, sine: of the rotary positions, shape ``(tokens, rotated)``, float32.
            caches: one per layer, None if attention was removed.

        Returns:
            False, without computing anything, if the header of a packed matrix has changed.
        """
        native: Any = library()
        handles = (_P * len(caches))(*(None if blocks is None else blocks.handle for blocks in caches))
        self.runs += 1
        return bool(
            native.pliant_decoder_run(
                self.handle,
                stream.data_ptr(),
                stream.shape[0],
                cosine.data_ptr(),
                sine.data_ptr(),
                cosine.shape[-1],
                handles,
                threads(),
                self.spent,
            )
        )


def decoder(
    layers: Sequence[Layer],
    *,
    hidden: int,
    width: int,
    activation: str,
    epsilon: float,
    scale: float,
    final_norm: torch.Tensor,
) -> Decoder:
    """Create a native decoder from layers.

    Arguments:
        hidden, width: elements of the residual stream and of a head.
        activation: the MLP's activation, one of :data:`ACTIVATIONS`.
        epsilon: of all norms, which are RMS norms.
        scale: factor of the attention scores.
        final_norm: weight of the norm after the last layer, shape ``(hidden,)``.

    Raises:
        PackedError: sizes do not match, tensors are not on the CPU, or the kernels are not available.
    """
    native: Any = library()
    if native is None:
        raise PackedError("pliant's kernels are not available; run 'pliant doctor' for the reason")
    held: list[torch.Tensor] = []

    def vector(tensor: torch.Tensor | None) -> _Vector:
        if tensor is None:
            return _Vector(None, 0)
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in TYPES:
            raise PackedError(
                f"a norm or a bias is {tensor.dtype} on {tensor.device}, or not contiguous; it must be a contiguous "
                "float on the CPU"
            )
        held.append(tensor)
        return _Vector(tensor.data_ptr(), TYPES[tensor.dtype])

    def projection(packed: Packed) -> _Projection:
        matrix = packed.packed
        if matrix.device.type != "cpu":
            raise PackedError(f"a packed matrix is on {matrix.device}; it must be on the CPU")
        held.append(matrix)
        return _Projection(matrix.data_ptr(), matrix.numel(), vector(packed.bias))

    plan = _Plan(hidden, width, ACTIVATIONS[activation], epsilon, scale, vector(final_norm))
    handle = native.pliant_decoder_new(ctypes.byref(plan))
    made = Decoder(handle, [layer.kv_heads for layer in layers], width, held)
    weakref.finalize(made, native.pliant_decoder_end, handle)
    for layer in layers:
        fields = _Layer(heads=layer.heads, kv_heads=layer.kv_heads, window=layer.window, rotary=layer.rotates)
        for name, packed in layer.packed.items():
            setattr(fields, name, projection(packed))
        for name, norm in layer.norms.items():
            setattr(fields, name, vector(norm))
        check(native.pliant_decoder_add(handle, ctypes.byref(fields)))
    return made
