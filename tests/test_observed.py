"""Packed layers under what torch does to a whole process or around a call: default dtypes, modes, traces, tangents."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pliant.runtime import library, reference
from pliant.runtime.kv_blocks import Blocks, Keeping, per_token
from pliant.runtime.packed_linear import Packed
from pliant.runtime.packed_matrix import FORMATS, pack, unpack
from pliant.runtime.sparse_break_even import _times
from pliant.torch_private import observed

needs_kernels = pytest.mark.skipif(library.library() is None, reason=library.state())


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def by_default(request):
    """Set another default dtype when called."""
    own = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(own)


@pytest.mark.parametrize("format", FORMATS)
def test_the_default_dtype_changes_no_packed_weight(format, by_default):
    weight = torch.randn(40, 64)
    layer = Packed.of(torch.nn.Linear(64, 40), format)
    x, packed, plain = (
        torch.randn(3, 64),
        pack(weight, format),
        reference.pack(weight, FORMATS.index(format), False, 64, None),
    )
    values, expected, read = unpack(packed), layer(x), layer.weight + 0
    by_default()
    assert unpack(packed).dtype == layer.dense().weight.dtype == torch.float32
    assert torch.equal(unpack(packed), values)
    assert torch.equal(pack(weight, format), packed)
    assert torch.equal(reference.pack(weight, FORMATS.index(format), False, 64, None), plain)
    assert torch.equal(layer.weight + 0, read)
    assert torch.equal(layer(x), expected)


@needs_kernels
def test_the_default_dtype_changes_no_cache(by_default):
    keeping = Keeping(format="int8")
    states = torch.randn(2, 130, 48)
    blocks = Blocks(keeping, 2, 24)
    blocks.append(*states)
    expected, size = blocks.read(), per_token(keeping, 2, 24)
    by_default()
    found = blocks.read()
    assert all(map(torch.equal, found, expected))
    assert copy.copy(blocks).read()[0].dtype == torch.float32
    per_token.cache_clear()
    assert per_token(keeping, 2, 24) == size


@needs_kernels
def test_the_default_dtype_does_not_change_which_product_is_timed(by_default, monkeypatch):
    seen = []
    monkeypatch.setattr("pliant.runtime.sparse_break_even.SIZE", (16, 64))
    monkeypatch.setattr("pliant.runtime.sparse_break_even.COLD", 1)
    monkeypatch.setattr("pliant.runtime.sparse_break_even.linear", lambda x, *_: seen.append(x.dtype))
    by_default()
    _times([pack(torch.randn(16, 64), "int8")])
    assert {*seen} == {torch.float32}


def sequential(format="int8"):
    return torch.nn.Sequential(Packed.of(torch.nn.Linear(64, 40), format), torch.nn.ReLU()).eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda module, x: make_fx(module)(x), torch.fx.symbolic_trace])
def test_a_trace_records_the_product(trace, grad):
    module = sequential()
    x, other = torch.randn(2, 3, 64)
    with torch.set_grad_enabled(grad):
        arguments = (module,) if trace is torch.fx.symbolic_trace else (module, x)
        traced = trace(*arguments)
        assert torch.equal(traced(x), module(x))
        assert torch.equal(traced(other), module(other))
        assert not torch.equal(module(other), module(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: F.linear(x, layer.weight, layer.bias)])
def test_a_tangent_passes_through(call, grad):
    layer = Packed.of(torch.nn.Linear(64, 40), "int8")
    x, along, of_bias = torch.randn(3, 64), torch.randn(3, 64), torch.randn(40)
    through = along @ layer.dense().weight.detach().T
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(layer, forward_ad.make_dual(x, along)))
        assert torch.equal(found.primal, call(layer, x))
        torch.testing.assert_close(found.tangent, through)
        assert forward_ad.unpack_dual(call(layer, x)).tangent is None
        layer.bias = forward_ad.make_dual(layer.bias, of_bias)
        found = forward_ad.unpack_dual(call(layer, forward_ad.make_dual(x, along)))
        torch.testing.assert_close(found.tangent, through + of_bias)
        torch.testing.assert_close(forward_ad.unpack_dual(call(layer, x)).tangent, of_bias.expand(3, 40))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatch, Function, forward_ad.dual_level])
def test_a_mode_is_observed(mode):
    """The names of torch that it reads are private."""
    assert not observed()
    with mode():
        assert observed()
    assert not observed()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_and_a_transform_are_observed():
    seen = []

    def function(x):
        seen.append(observed())
        return x * 2

    x = torch.ones(3)
    torch.jit.trace(function, x, check_trace=False)
    torch.func.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    function(x)
    assert seen == [True, True, True, False]
