"""The weight of a packed layer as a read-only tensor, for code that reads the weight instead of calling the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from pliant.errors import PackedError
from pliant.runtime.packed_matrix import unpack
from pliant.torch_private import forward_differentiation

_ABOUT = {  # attributes and methods that need no values
    *("dtype", "shape", "size", "dim", "ndim", "numel", "nelement", "element_size", "itemsize", "nbytes", "__len__"),
    *("stride", "is_contiguous", "layout", "is_floating_point", "is_complex", "is_sparse", "is_nested", "is_quantized"),
    *("is_mkldnn", "is_cuda", "is_xpu", "is_mps", "requires_grad", "grad", "grad_fn", "is_leaf", "__hash__"),
}
_WHERE = {"is_cpu": True, "is_meta": False}
_SELF = {"data", "detach"}  # returned as the read-only view, because they alias the weight
_ADDRESS = {
    *("data_ptr", "storage", "untyped_storage", "storage_offset", "__array_interface__", "__cuda_array_interface__"),
}


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    """The op ``pliant::linear``, with a tangent of x or of the bias in forward-mode differentiation.

    The op has no rule for tangents and would drop them. A tangent is multiplied with the unpacked weights, like a
    gradient.
    """
    apply = torch.ops.pliant.linear
    if not forward_differentiation():
        return apply(x, weight, bias, out_features)
    x, tangent = forward_ad.unpack_dual(x)
    bias, shift = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    primal = apply(x, weight, bias, out_features)
    if tangent is not None:
        tangent = F.linear(tangent, unpack(weight).to(tangent.dtype))
    if shift is not None:
        shift = shift.to(primal.dtype).expand_as(primal)
        tangent = shift if tangent is None else tangent + shift
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


class PackedWeight(torch.Tensor):
    """The tensor that ``layer.weight`` of a packed layer returns, shape ``(out_features, in_features)``, in the layer's
    dtype.

    ``F.linear`` with it computes the packed product. Every other operation unpacks it first, which is slow. PyTorch's
    fused encoder layers, which would read its memory directly, are skipped because it is not a plain tensor. It is
    read-only.
    """

    packed: torch.Tensor

    @staticmethod
    def of(packed: torch.Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> PackedWeight:
        """The view of ``packed``, a packed matrix of shape ``(bytes,)``."""
        view = torch.empty(out_features, in_features, dtype=dtype, device="meta").as_subclass(PackedWeight)
        vars(view).update(vars(packed))  # attributes that others set on tensors: transformers marks initialised ones
        view.packed = packed
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute ``func`` with the packed or the unpacked weight.

        Raises:
            PackedError: ``func`` writes to a packed weight, or asks for its memory address.
        """
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            name = func.__self__.__name__
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        own = first if isinstance(first, PackedWeight) else None
        if own is not None:
            if name in _ABOUT:
                return super().__torch_function__(func, types, args, kwargs)
            if name == "device":
                return own.packed.device
            if name in _WHERE:
                return _WHERE[name]
            if name in _SELF:
                return own
            if name in _ADDRESS:
                raise PackedError(
                    f"a packed weight has no {name}, because its values are not in memory; use layer.dense().weight"
                )
            if writes(name) and not (name == "requires_grad_" and not args[1:] and kwargs == {"requires_grad": False}):
                raise PackedError(
                    f"a packed weight is read-only ({name} writes to it); change the model before packing"
                )
        if _held(kwargs.get("out")):
            raise PackedError("a packed weight is read-only and cannot be out=; change the model before packing")
        if func is F.linear and own is None and len(args) > 1 and isinstance(args[1], PackedWeight):
            x, view, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
            return product(x, view.packed, bias, view.shape[0])
        if name.startswith("linear") and func in (torch.ops.pliant.linear, torch.ops.pliant.linear.default):
            return func(*map(_packed, args), **{key: _packed(value) for key, value in kwargs.items()})
        return func(*_dense(args), **_dense(kwargs))


def writes(name: str) -> bool:
    """Whether the tensor method ``name`` changes its tensor."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delete__") or (name.startswith("__i") and name not in _READS)
    return name.endswith("_")


_READS = ("__index__", "__int__", "__invert__")


def _held(value: Any) -> bool:
    return isinstance(value, PackedWeight) or (isinstance(value, tuple | list) and any(map(_held, value)))


def _packed(value: Any) -> Any:
    """The bytes of a packed weight; any other argument as it is."""
    return value.packed if isinstance(value, PackedWeight) else value


def _dense(value: Any) -> Any:
    """The same arguments, with packed weights replaced by unpacked tensors."""
    if isinstance(value, PackedWeight):
        return unpack(value.packed).to(value.dtype)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return type(value)(map(_dense, value)) if _held(value) or type(value) is tuple else value
