"""Importance of the parts of a scan: heads, Mamba-1 channels, and the state, which no matrix reads."""

import importlib

import pytest
import torch
from torch.nn import functional as F

import pliant
from pico import IDS, logits, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.compat.scan import watched_scan_inputs
from pliant.criteria import by_falling
from pliant.criteria.activation import activation_sizes
from pliant.criteria.importance import measured
from pliant.criteria.scan_states import state_squares
from pliant.criteria.unit_fisher import loss_increases
from pliant.elastic import Subnet, extract, reorder
from pliant.errors import StepError

SCANS = hasattr(importlib.import_module("transformers.models.mamba2.modeling_mamba2"), "mamba2_chunk_scan")
pytestmark = [
    pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function"),
    pytest.mark.filterwarnings("ignore"),
]
FAMILIES = ("mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1", "jamba")
MEASURES = ("l1", "activation", "fisher")
PROSE = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 9)])


def scan_blocks(model):
    """(block, its mixer) for every scan."""
    anatomy = anatomy_of(model)
    path = anatomy.architecture.layers
    blocks = [block for block in anatomy.blocks.values() if block.role == "scan"]
    return [(block, model.get_submodule(f"{path}.{block.layer}.{block.spec.module}")) for block in blocks]


def scan_function(model):
    """(modeling file, name of the scan function in it)."""
    module = importlib.import_module(type(model).__module__)
    return module, next(name for name in ("mamba2_chunk_scan", "mamba_selective_scan") if hasattr(module, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_fisher_of_scans_is_what_factors_on_every_unit_and_token_say(name, monkeypatch):
    """One graph of the whole model: factors on C, and on all inputs of matrices that read heads or channels."""
    model = pico(name)
    module, function = scan_function(model)
    original, factors, running = getattr(module, function), {}, []

    def factor(axis):
        return factors.setdefault(axis.name, torch.ones(*IDS.shape, *axis.shape, 1, requires_grad=True))

    def scaled_state(x, dt, a, b, c, **others):
        factor_of = factor(running[-1].state_axis).squeeze(-1)
        c = c * (factor_of.transpose(1, 2) if function == "mamba_selective_scan" else factor_of.view(c.shape))
        return original(x, dt, a, b, c, **others)

    def scaled_inputs(axis):
        def hook(_module, args):
            values = args[0].view(*IDS.shape, axis.size, -1)
            return (values.mul(factor(axis)).view(args[0].shape),)

        return hook

    monkeypatch.setattr(module, function, scaled_state)
    for block, mixer in scan_blocks(model):
        width = next(axis for axis in block.leaders if axis.leader in ("scan", "channels"))
        mixer.register_forward_pre_hook(lambda *_, block=block: running.append(block))
        for reader in (mixer.out_proj, *([mixer.x_proj] if hasattr(mixer, "x_proj") else [])):
            reader.register_forward_pre_hook(scaled_inputs(width))
    given = model(input_ids=IDS, use_cache=False).logits
    F.cross_entropy(given[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    monkeypatch.undo()
    found = loss_increases(pico(name), anatomy_of(model), IDS)
    assert len(factors) == 2 * len(scan_blocks(model))
    for axis, ones in factors.items():
        slopes = ones.grad.double().squeeze(-1).flatten(0, 1)
        torch.testing.assert_close(found[axis], slopes.square().sum(0) / (2 * IDS.numel()), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_size_of_a_state_unit_is_what_the_scan_returns_with_it_alone(name):
    model = pico(name)
    module, function = scan_function(model)
    original, expected, seen = getattr(module, function).__wrapped__, [], []
    alone = 3

    def scan_alone(x, dt, a, b, c, **others):
        dim = 1 if function == "mamba_selective_scan" else 3
        only = c * (torch.arange(c.shape[dim]) == alone).view([-1 if i == dim else 1 for i in range(c.dim())])
        output = original(x, dt, a, b, only, **{**others, "D": None, "z": None})
        squares = (output[0] if isinstance(output, tuple) else output).double().square()
        # of each group of heads
        groups = 1 if function == "mamba_selective_scan" else c.shape[2]
        expected.append(squares.sum().view(1) if groups == 1 else squares.unflatten(2, (groups, -1)).sum((0, 1, 3, 4)))
        return original(x, dt, a, b, c, **others)

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(module, function, scan_alone)
        model(input_ids=IDS, use_cache=False)
    with watched_scan_inputs(lambda inputs: seen.append(state_squares(inputs)[:, alone]) or inputs.C), torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-4, atol=0)
    sizes = activation_sizes(model, anatomy_of(model), IDS)
    for (block, _), size in zip(scan_blocks(model), seen, strict=True):
        torch.testing.assert_close(sizes[block.state_axis.name][..., alone].view(-1), size.sqrt())


def silence(block, mixer, units):
    """Make units of the state of a scan useless: no token adds anything to ``units[copy]``."""
    size = block.state_axis.size
    start = mixer.time_step_rank if hasattr(mixer, "x_proj") else 2 * mixer.intermediate_size
    rows = [start + copy * size + unit for copy, of_copy in enumerate(units) for unit in of_copy]
    with torch.no_grad():
        if hasattr(mixer, "x_proj"):
            mixer.x_proj.weight[rows] = 0
        else:
            mixer.in_proj.weight[rows] = 0
            if mixer.in_proj.bias is not None:
                mixer.in_proj.bias[rows] = 0
            mixer.conv1d.bias[[row - mixer.intermediate_size for row in rows]] = 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("by", MEASURES)
def test_units_of_the_state_that_nothing_enters_come_last_in_every_group(name, by):
    model = pico(name)
    silent = {}
    for index, (block, mixer) in enumerate(scan_blocks(model)):
        axis = block.state_axis
        silent[axis.name] = units = [[(index + copy) % 3, 3 + copy, 5 + copy] for copy in range(axis.copies)]
        silence(block, mixer, units)
    anatomy, before = anatomy_of(model), logits(model)
    orders = by_falling(measured(model, anatomy, by, IDS), anatomy)
    for axis, units in silent.items():
        assert orders[axis].view(-1, anatomy.axes[axis].size)[:, -3:].sort().values.tolist() == units
    reorder(model, anatomy, orders)
    subnet = Subnet()
    for axis in silent:
        subnet = subnet.keeping(axis, anatomy.axes[axis].size - 3)
    extract(model, anatomy, subnet)
    if name not in ("falcon_mamba", "jamba"):  # they have norms over the state
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_measure_covers_every_axis_of_a_scan(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    axes = {axis.name for block, _ in scan_blocks(model) for axis in block.leaders if axis.leader != "rank"}
    for by in MEASURES:
        assert axes <= measured(model, anatomy, by, IDS).keys()


def test_a_state_that_is_gone_has_no_units_to_measure():
    model = pico("mamba2")
    extract(model, anatomy_of(model), Subnet().keeping("layers.1.mamba.state", 0))
    anatomy = anatomy_of(model)
    assert pliant.importance(model)["layers.1.mamba.state"].shape == (0,)
    for by in ("activation", "fisher"):
        found = measured(model, anatomy, by, IDS)
        assert anatomy.axes.keys() - found.keys() == {"layers.1.mamba.state"}
        assert all((of_units > 0).any() for of_units in found.values())


def test_axes_with_a_matrix_that_is_never_called_are_left_out():
    """``dt_proj`` reads the rank, but Mamba multiplies by its weight: hooks see nothing."""
    model = pico("jamba")
    anatomy = anatomy_of(model)
    assert anatomy.axes["layers.0.mamba.rank"].size == 5
    for measure in (activation_sizes, loss_increases):
        found = measure(model, anatomy, IDS)
        of_scans = {name for name in anatomy.axes if ".mamba." in name}
        assert {name for name in of_scans if name.endswith("rank")} == of_scans - found.keys()


def test_importance_has_a_value_for_each_unit_and_orders_one_for_each_copy():
    model = pico("mamba2")
    anatomy = anatomy_of(model)
    axis = anatomy.axes["layers.1.mamba.state"]
    for by in MEASURES:
        of_copies = measured(model, anatomy, by, IDS)[axis.name]
        assert of_copies.shape == (2, axis.size)
        assert not torch.equal(*of_copies.argsort())
        text = {} if by == "l1" else {"data": PROSE, "tokenizer": tokenizer(), "samples": 2, "seqlen": 9}
        assert {name: values.shape for name, values in pliant.importance(model, by, **text).items()} == {
            name: (anatomy.axes[name].size,) for name in measured(model, anatomy, by, IDS)
        }
    assert torch.equal(pliant.importance(model)[axis.name], measured(model, anatomy, "l1")[axis.name].sum(0))


def test_an_importance_of_your_own_may_sort_copies_alike_or_one_by_one(monkeypatch):
    model = pico("mamba2")
    anatomy, given = anatomy_of(model), torch.arange(20.0).view(2, 10)
    axis = anatomy.axes["layers.1.mamba.state"]
    given, mine = given[:, : axis.size], {}
    monkeypatch.setattr("pliant.criteria.importance.find", lambda *_: lambda _model, _anatomy: mine)
    for values, shape in ((given, (2, axis.size)), (given[0], (axis.size,))):
        mine[axis.name] = values
        order = by_falling(measured(model, anatomy, "mine:own"), anatomy)[axis.name]
        assert order.tolist() == torch.arange(axis.size).flip(0).expand(shape).tolist()
        reorder(model, anatomy, {axis.name: order})
    for values in (given[:1], given.flatten(), given[:, 1:]):
        mine[axis.name] = values
        with pytest.raises(
            StepError, match=f"for 'layers.1.mamba.state', which has {axis.size} units, it gave the shape"
        ):
            measured(model, anatomy, "mine:own")
