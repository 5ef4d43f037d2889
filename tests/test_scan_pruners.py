"""Every pruner on state-space models: saved, run again, interrupted, with and without prefixes."""

import copy
import warnings

import pytest
import torch

import pliant
from pico import SCANS, logits, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, parameters
from pliant.progress import Progress
from pliant.prune.moves import width_moves
from pliant.prune.scan_skip import scans_of
from pliant.prune.width_cuts import widths

FAMILIES = ("mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h")
TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
SHARED = {"ratio": 0.1, "samples": 4, "seqlen": 24}
STEPS = {
    "fisher": lambda: pliant.FisherPruner(**SHARED, repair=4),
    "knapsack": lambda: pliant.KnapsackPruner(**SHARED, repair=4, swaps=4),
    "unified": lambda: pliant.UnifiedPruner(**SHARED, repair=4, order="fisher"),
    "one-shot": lambda: pliant.OneShot(**SHARED, repair=4),
    "channels": lambda: pliant.ChannelPruner(ratio=0.1),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function"),
]


def prune(model, step, **options):
    return pliant.apply(model, step, TEXT, tokenizer=tokenizer(), **{"progress": False, **options})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", STEPS)
def test_a_pruned_model_is_saved_and_the_same_run_again_gives_it(name, kind, tmp_path):
    model, again = pico(name), pico(name)
    dense = parameters(anatomy_of(model))
    prune(model, STEPS[kind](), work=tmp_path / "work")
    record = model.pliant_history[0]
    assert record["ratio"] == 1 - sum(parameter.numel() for parameter in model.parameters()) / dense
    pliant.save(model, tmp_path / "out")
    assert torch.equal(logits(pliant.load(tmp_path / "out")), logits(model))
    prune(again, STEPS[kind](), work=tmp_path / "work")
    assert torch.equal(logits(again), logits(model))
    assert all(not counters["evaluations"] for counters in again.pliant_history[0].get("counters", {}).values())
    fits = [fit["distance"] for fit in record.get("repair", ())]
    assert all(fit is None or fit["after"] <= fit["before"] + 1e-6 for fit in fits)
    assert any(fits) or kind == "channels"


@pytest.mark.parametrize("name", ["mamba", "mamba2", "nemotron_h"])
def test_a_search_over_widths_reuses_prefixes_and_removes_what_a_naive_one_does(name):
    subnets = []
    for search in ("naive", "exact"):
        model = prune(pico(name), pliant.UnifiedPruner(**SHARED, search=search, head_group=2, mlp_group=16))
        subnets.append(model.pliant_history[0]["subnet"])
    assert subnets[0] == subnets[1]


class Stopped(Progress):
    def __init__(self, after):
        super().__init__()
        self.left = after

    def emit(self, event, **_):
        self.left -= event == "step"
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_an_interrupted_search_leaves_the_model_as_it_was_and_resumes(name, tmp_path):
    model, straight = pico(name), pico(name)
    before = copy.deepcopy(model.state_dict())
    step = pliant.UnifiedPruner(**SHARED, order="activation")
    with pytest.raises(KeyboardInterrupt):
        prune(model, step, work=tmp_path, progress=Stopped(8))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    prune(model, step, work=tmp_path)
    prune(straight, step)
    assert torch.equal(logits(model), logits(straight))
    assert sum(counters["replayed"] for counters in model.pliant_history[0]["counters"].values()) > 0


def test_a_state_is_cut_in_eighths_and_down_to_nothing():
    anatomy = anatomy_of(pico("mamba2", state_size=32))
    state, scan = anatomy.axes["layers.0.mamba.state"], anatomy.axes["layers.0.mamba.scan"]
    assert widths(state, 32) == [28, 24, 20, 16, 12, 8, 4, 0]
    assert widths(state, 2) == list(range(30, -2, -2))
    assert widths(state, 32, least=9) == [28, 24, 20, 16, 12]
    assert widths(scan, 32) == [4]  # heads of 8 elements, as many in each of two groups
    step, groups = pliant.UnifiedPruner(**SHARED), {}

    class Job:
        model = pico("mamba2", state_size=32)

    groups = step.mlp_groups(Job, anatomy)
    assert groups == {"group": 1, "scan": 1, "state": 4}
    offered = {move.unit: dict(move.subnet.keep)[move.unit] for move in width_moves(anatomy, groups)(Subnet())}
    assert offered["layers.0.mamba.state"] == 28
    assert offered["layers.0.mamba.scan"] == 6


def test_fisher_pruning_removes_the_state_that_nothing_enters():
    model = pico("mamba2", state_size=16)
    mixer = model.backbone.layers[2].mixer
    silent = [1, 4, 5, 6, 9, 10, 14, 15], [0, 1, 2, 3, 6, 7, 8, 14]  # of each group of heads
    start = mixer.intermediate_size
    with torch.no_grad():
        for copied in range(2):
            rows = [start + copied * 16 + unit for unit in silent[copied]]
            mixer.in_proj.weight[[start + row for row in rows]] = 0
            mixer.conv1d.bias[rows] = 0
    anatomy, before = anatomy_of(model), logits(model)
    subnet = Subnet().keeping("layers.2.mamba.state", 8)
    ratio = 1 - parameters(anatomy, subnet) / parameters(anatomy)
    prune(model, pliant.FisherPruner(ratio=ratio, samples=4, seqlen=24))
    assert model.pliant_history[0]["subnet"] == subnet.to_dict()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_every_state_stays_where_units_are_taken_for_independent(name):
    """Without this limit, a ratio of 0.1 removes whole states here: the estimates of their units are the smallest."""
    model = pico(name)
    axes = anatomy_of(model).axes
    prune(model, pliant.FisherPruner(**SHARED, group=2))
    keep = model.pliant_history[0]["subnet"]["keep"]
    states = {axis: units for axis, units in keep.items() if axis.endswith(".state")}
    assert states
    assert all(units >= axes[axis].size / 2 for axis, units in states.items())


GROUPED = {"mamba2": ("group", 2), "nemotron_h": ("group", 2), "qwen3_5_text": ("key", 3)}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_removed_one_by_one_whatever_their_width(name):
    short, count = GROUPED[name]
    anatomy = anatomy_of(pico(name))
    axes = [axis for axis in anatomy.axes.values() if axis.leader == short]
    assert axes
    for axis in axes:
        assert axis.grouping
        assert widths(axis, 32) == list(range(count - 1, 0, -1))


def with_useless_group(name):
    """A model whose second scan gets nothing out of its first group, and the sub-network without a group there."""
    model, (short, count) = pico(name), GROUPED[name]
    block = [block for block in anatomy_of(model).blocks.values() if block.role == "scan"][1]
    mixer = model.base_model.layers[block.layer].get_submodule(block.spec.module)
    with torch.no_grad():
        if short == "group":
            inputs = mixer.intermediate_size // count
            mixer.conv1d.weight[:inputs] = 0
            mixer.conv1d.bias[:inputs] = 0
            mixer.in_proj.weight[mixer.intermediate_size :][:inputs] = 0
        else:
            mixer.out_proj.weight[:, : mixer.value_dim // count] = 0
    return model, Subnet().keeping(f"{block.name}.{short}", count - 1)


@pytest.mark.parametrize("name", GROUPED)
def test_fisher_pruning_removes_the_group_that_adds_nothing(name):
    model, subnet = with_useless_group(name)
    anatomy, before = anatomy_of(model), logits(model)
    ratio = 1 - parameters(anatomy, subnet) / parameters(anatomy)
    prune(model, pliant.FisherPruner(ratio=ratio, samples=4, seqlen=24))
    assert model.pliant_history[0]["subnet"] == subnet.to_dict()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_a_knapsack_removes_the_group_that_adds_nothing(name):
    model, subnet = with_useless_group(name)
    anatomy, before = anatomy_of(model), logits(model)
    ratio = 1 - parameters(anatomy, subnet) / parameters(anatomy)
    prune(model, pliant.KnapsackPruner(ratio=0.999 * ratio, samples=4, seqlen=24, metric="kl"))
    assert model.pliant_history[0]["subnet"] == subnet.to_dict()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_channel_pruning_removes_the_group_with_the_smallest_weights(name):
    model, subnet = with_useless_group(name)
    ((axis, units),) = subnet.keep
    anatomy = anatomy_of(model)
    block = anatomy.blocks[axis.rpartition(".")[0]]
    norms = pliant.importance(model)
    norms[axis][0] = 0
    ratio = 1 - parameters(anatomy, subnet) / parameters(anatomy)
    chosen = pliant.ChannelPruner(ratio=ratio, allocation="global").choose(anatomy, norms)
    assert dict(chosen.keep) == {axis: units}
    assert block.role == "scan"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_knapsack_removes_the_scan_that_adds_nothing(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    block = scans_of(anatomy)[1]
    mixer = model.base_model.layers[block.layer].get_submodule(block.spec.module)
    subnet = Subnet().keeping(block.state_axis.name, 0)
    with torch.no_grad():
        if hasattr(mixer, "x_proj"):
            mixer.x_proj.weight[mixer.time_step_rank :] = 0
        else:
            mixer.conv1d.weight[mixer.intermediate_size :] = 0
            mixer.conv1d.bias[mixer.intermediate_size :] = 0
    before = logits(model)
    ratio = 1 - parameters(anatomy, subnet) / parameters(anatomy)
    menu = pliant.KnapsackPruner(ratio=ratio)._menus(anatomy)[block.name]
    assert subnet in menu
    sizes = [parameters(anatomy, choice) for choice in menu]
    assert sizes == sorted(set(sizes), reverse=True)
    prune(model, pliant.KnapsackPruner(ratio=0.999 * ratio, samples=4, seqlen=24, metric="kl"))
    assert model.pliant_history[0]["subnet"] == subnet.to_dict()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_a_model_with_removed_scans_is_pruned_again(name):
    model = prune(pico(name), pliant.MambaShedder(target="ssm", steps=2, samples=4, seqlen=24))
    prune(model, pliant.FisherPruner(ratio=0.1, samples=4, seqlen=24))
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_what_remains_of_a_removed_scan_gets_no_adapter(name):
    model = prune(pico(name), pliant.MambaShedder(target="ssm", steps=2, samples=4, seqlen=24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of an adapter without rows
        prune(model, pliant.Recover(method="lora", steps=2, batch_size=2, seqlen=24, held_out=0))
    assert torch.isfinite(logits(model)).all()
