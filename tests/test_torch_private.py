"""Every private name of torch in pliant.torch_private means in this torch what pliant takes it for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

import pliant
from pliant.anatomy.trace import CHANNEL_NORMS
from pliant.runtime.dense import CONVOLUTIONS
from pliant.torch_private import (
    CALL_HOOKS,
    STATE_HOOKS,
    copy_with_child,
    forward_differentiation,
    has_state_hooks,
    is_compiled,
    operator_arguments,
    operator_name,
    own_tensors,
    share_call_hooks,
)


def test_all_kinds_of_hooks_are_known():
    assert {*CALL_HOOKS, *STATE_HOOKS} == {name for name in vars(nn.Linear(1, 1)) if "hook" in name}


def test_call_hooks_are_shared_with_their_handles():
    source, target, seen = nn.Linear(2, 2), nn.Linear(2, 2), []
    share_call_hooks(source, target)
    handles = [
        source.register_forward_pre_hook(lambda *_: seen.append("before")),
        source.register_forward_hook(lambda *_: seen.append("after")),
    ]
    target(torch.ones(1, 2))
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    target(torch.ones(1, 2))
    assert seen == ["before", "after"]


@pytest.mark.parametrize(
    "add",
    [
        lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
        lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    ],
)
def test_hooks_of_the_state_are_seen(add):
    layer = nn.Linear(2, 2)
    assert not has_state_hooks(layer)
    add(layer)
    assert has_state_hooks(layer)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_modules_are_seen():
    layer = nn.Linear(2, 2)
    assert not is_compiled(layer)
    assert is_compiled(torch.compile(layer))
    layer.compile()
    assert is_compiled(layer)


def test_a_view_takes_the_place_of_a_parameter():
    layer = nn.BatchNorm1d(4)
    view = layer.weight[:2]
    own_tensors(layer)["weight"] = view
    assert layer.weight is view
    mean = layer.running_mean[:2]
    own_tensors(layer, buffers=True)["running_mean"] = mean
    assert layer.running_mean is mean


def test_a_copy_shares_all_but_one_child():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    copied = copy_with_child(module, "1", nn.Identity())
    assert copied[0] is module[0]
    assert isinstance(copied[1], nn.Identity)
    assert isinstance(module[1], nn.Linear)


def test_operators_are_named_with_their_arguments():
    assert operator_name(torch.ops.aten.add_.Tensor) == "add_"
    assert operator_name(torch.add) == operator_name("add") == ""
    assert [one.name for one in operator_arguments(torch.ops.aten.linear.default)] == ["input", "weight", "bias"]
    assert operator_arguments(torch.ops.aten.flatten.using_ints)[1].default_value == 0
    assert not operator_arguments(torch.add)


def test_forward_differentiation_is_seen():
    assert not forward_differentiation()
    with forward_ad.dual_level():
        assert forward_differentiation()
    assert not forward_differentiation()


@pytest.mark.parametrize(("base", "listed"), [(_ConvNd, CONVOLUTIONS), (_NormBase, CHANNEL_NORMS)])
def test_every_public_layer_of_a_private_base_is_listed(base, listed):
    public = {one for one in vars(nn).values() if isinstance(one, type) and issubclass(one, base)}
    public -= {one for one in public if issubclass(one, LazyModuleMixin)}  # they become one of the others when they run
    assert public
    assert {one.__name__ for one in public if not issubclass(one, listed)} == set()


def test_no_other_part_below_compat_names_what_is_private():
    """``torch._x`` and imports of ``_x`` from torch or transformers stand in compat and in pliant.torch_private
    alone."""
    root = Path(pliant.__file__).parent
    private = re.compile(
        r"torch\._[a-zA-Z]|^\s*from (torch|transformers)\S* import .*\b_[a-zA-Z]|forward_ad\._", re.MULTILINE
    )
    private_in = {path.relative_to(root) for path in root.rglob("*.py") if private.search(path.read_text("utf-8"))}
    elsewhere = {path.as_posix() for path in private_in if path.parts[0] != "compat"}
    assert Path("compat/outputs.py") in private_in
    assert elsewhere == {"torch_private.py"}
