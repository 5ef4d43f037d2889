"""The op ``pliant::linear`` and the layer that calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pliant.errors import PackedError
from pliant.runtime.dense import is_linear, sizes_of, weight_of, why_kept
from pliant.runtime.library import library
from pliant.runtime.packed_matrix import Header, check, header, pack, room, unpack, verify
from pliant.runtime.packed_weight import PackedWeight, product
from pliant.runtime.threads import threads
from pliant.torch_private import observed, own_tensors, share_call_hooks

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ops = torch.library.Library("pliant", "DEF")
_ops.define("linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    """``x W^T + bias`` with a packed W.

    In int8 and int4, x is rounded to 8 bits as well, with a scale per row and 32 inputs. The result of a row does not
    depend on the other rows, nor on the number of threads.

    Arguments:
        x: shape ``(..., in_features)``, float32, bfloat16 or float16.
        weight: a packed matrix, shape ``(bytes,)``.
        bias: shape ``(out_features,)``, or None.

    Returns:
        Shape ``(..., out_features)``, of x's dtype.

    Raises:
        PackedError: the matrix is invalid, its size does not match x, or x is not floating-point.
    """
    if not x.is_floating_point():
        raise PackedError(
            f"a packed layer needs a floating-point input, not {str(x.dtype).removeprefix('torch.')}; convert it first"
        )
    native = library()
    if native is None or x.dtype not in TYPES:
        dense = unpack(weight).to(x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    columns = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    if x.stride(-1) != 1 or not (x.dim() <= 2 or x.is_contiguous()):
        x = x.contiguous()
    rows = x.numel() // columns if columns else 0
    stride = x.stride(-2) if x.dim() == 2 else columns
    kind = TYPES[x.dtype]
    failed = native.pliant_linear(
        weight.data_ptr(),
        weight.numel(),
        columns,
        out_features,
        x.data_ptr(),
        kind,
        rows,
        stride,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        kind,
        out_features,
        threads(),
    )
    if failed:
        check(failed)
    return y


def _fake(x: torch.Tensor, _: torch.Tensor, __: torch.Tensor | None, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001  (named by torch)
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
    """The gradient of x, computed with the unpacked weights; the weights themselves get none."""
    (weight,) = ctx.saved_tensors
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
    return gradient @ unpack(weight).to(gradient.dtype), None, of_bias, None


_ops.impl("linear", linear, "CPU")
torch.library.register_fake("pliant::linear", _fake, lib=_ops)
torch.library.register_autograd("pliant::linear", _backward, setup_context=_remember, lib=_ops)


class Packed(nn.Module):
    """A linear layer whose weight is packed.

    Its state has ``weight``, the packed matrix as bytes, and ``bias``. It runs on the CPU.

    Attributes:
        dtype: the dtype of ``weight``: that of the original layer, or of the last ``.to(dtype)``.
        tied: whether its weight is also stored by another module (an embedding), so that it adds no parameters.
    """

    bias: torch.Tensor | None
    tied: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.register_buffer("weight", packed)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        format: str,
        *,
        sparse: bool = False,
        group: int = 128,
        packed: torch.Tensor | None = None,
    ) -> Packed:
        """Pack a ``torch.nn.Linear`` or transformers' ``Conv1D``; its forward and backward hooks are kept.

        Arguments:
            packed: the packed matrix, if another layer with the same weight was packed already.

        Raises:
            PackedError: the layer is of another kind, or cannot be replaced by a packed one.
        """
        if not is_linear(layer):
            raise PackedError(
                f"{type(layer).__name__} cannot be packed; give a torch.nn.Linear or transformers' Conv1D"
            )
        if why := why_kept(layer):
            raise PackedError(f"{type(layer).__name__} cannot be packed: {why}")
        dense: Any = layer
        if packed is None:
            packed = pack(weight_of(dense), format, sparse=sparse, group=group)
        rows, columns = sizes_of(dense)
        made = cls(columns, rows, packed, dense.bias, dense.weight.dtype)
        share_call_hooks(dense, made)
        return made.train(dense.training)

    @property
    def packed(self) -> torch.Tensor:
        """The packed matrix, shape ``(bytes,)``, uint8."""
        packed = own_tensors(self, buffers=True)["weight"]
        assert packed is not None
        return packed

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a read-only tensor, shape ``(out_features, in_features)``; on the meta device, its bytes."""
        packed = own_tensors(self, buffers=True).get("weight")
        if packed is None:
            raise AttributeError("weight")
        if packed.is_meta:
            return packed
        return PackedWeight.of(packed, self.out_features, self.in_features, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape ``(..., in_features)`` to ``(..., out_features)``."""
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor or not self._plain(x):
            return product(x, self.packed, self.bias, self.out_features)
        return linear(x, self.packed, self.bias, self.out_features)

    def _plain(self, x: torch.Tensor) -> bool:
        """Whether torch's dispatcher can be bypassed: no gradient or trace is wanted, and x is on the CPU."""
        return x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad) and not observed()

    def header(self) -> Header:
        """The header of the packed weight."""
        return header(self.packed)

    def parameters_held(self) -> int:
        """Parameters of the layer that it replaces, without a tied weight."""
        own = 0 if self.tied else self.in_features * self.out_features
        return own + (0 if self.bias is None else self.out_features)

    def dense(self) -> nn.Linear:
        """An ordinary linear layer with the unpacked weights, in float32."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=torch.float32)
        with torch.no_grad():
            layer.weight.copy_(unpack(self.packed))
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def settle(self) -> None:
        """Check a weight that was read from a file, and move it to the memory that is read fastest.

        Raises:
            PackedError: it is damaged, or its size differs from the layer's.
        """
        self._check(self.packed)
        own_tensors(self, buffers=True)["weight"] = room(self.packed.numel()).copy_(self.packed)

    def _check(self, packed: torch.Tensor) -> None:
        """Check packed bytes for this layer."""
        verify(packed)
        size = header(packed)
        if (size.rows, size.columns) != (self.out_features, self.in_features):
            raise PackedError(
                f"a packed matrix of {size.rows} x {size.columns} was loaded into a layer of "
                f"{self.out_features} x {self.in_features}"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, torch.Tensor):
            if weight.dtype != torch.uint8:
                raise PackedError(
                    f"{prefix}weight is a dense weight of shape {tuple(weight.shape)}, but this layer is packed; load "
                    "it into the model before packing"
                )
            self._check(weight)
            own_tensors(self, buffers=True)["weight"] = room(weight.numel())  # its size depends on the sparsity
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers"):
            self.settle()

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        """Apply ``fn``, such as ``.to(dtype)``, to the layer but keep the packed bytes."""
        moved, bytes_ = fn(torch.empty(0, dtype=self.dtype)), fn(torch.empty(0, dtype=torch.uint8))
        if moved.device.type != "cpu":
            raise PackedError(
                f"packed layers run on the CPU and cannot be moved to {moved.device}; move the model before packing"
            )
        if bytes_.dtype != torch.uint8 or not moved.dtype.is_floating_point:
            raise PackedError(
                f"packed bytes cannot be converted to {bytes_.dtype}; use .to(dtype) with a floating-point dtype"
            )
        super()._apply(fn, recurse)
        self.dtype = moved.dtype
        return self

    def extra_repr(self) -> str:
        found = self.header()
        form = f"{found.format} of {found.group}" if found.group else found.format
        how = f"{form}{' sparse' if found.sparse else ''}, {found.bits:.2f} bits a weight"
        return f"in_features={self.in_features}, out_features={self.out_features}, {how}"
