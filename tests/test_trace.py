"""Convolutional networks: the same invariants as for every other model, on anatomies that were traced."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageClassification

import pliant
from convnets import HUB, IMAGES, NETS, Basic, logits, net, subnets
from pliant.anatomy import anatomy_of
from pliant.checkpoint.per_layer_config import write
from pliant.elastic import Elastic, Subnet, check, extract, macs, parameters, reorder, validate
from pliant.errors import ArchitectureError, SubnetError


def read(name):
    model = net(name)
    return model, anatomy_of(model, example=IMAGES)


def few(name, count):
    """Tracing a network of 17 blocks takes its time."""
    many = 1 if name == "mobilenet_v2" else count
    return settings(max_examples=many, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def everything_less(anatomy, share=0.6):
    """Every axis narrowed, nothing skipped."""
    subnet = Subnet()
    for axis in anatomy.axes.values():
        subnet = subnet.keeping(axis.name, max(1, int(share * axis.size)))
    return subnet


@pytest.mark.parametrize("name", NETS)
def test_what_was_traced_passes_the_self_check(name):
    model, anatomy = read(name)
    before = logits(model)
    check(model, anatomy)
    assert torch.equal(logits(model), before)
    assert anatomy.rest == 0
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy)


@pytest.mark.parametrize("name", NETS)
def test_reordering_channels_keeps_the_logits(name):
    model, anatomy = read(name)
    dense = logits(model)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        orders = {n: torch.randperm(axis.size, generator=generator) for n, axis in anatomy.axes.items()}
        weights = copy.deepcopy(model.state_dict())
        reorder(model, anatomy, orders)
        assert any(not torch.equal(weights[path], tensor) for path, tensor in model.state_dict().items())
        assert close(logits(model), dense, 2e-5)
        reorder(model, anatomy, {axis: torch.argsort(order) for axis, order in orders.items()})
        assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("name", NETS)
def test_activated_equals_extracted_equals_reloaded_and_costs_what_was_counted(name, tmp_path):
    model, anatomy = read(name)
    dense = logits(model)

    @few(name, 4)
    @given(data=st.data())
    def holds(data):
        subnet = data.draw(subnets(anatomy))
        with pliant.activate(model, subnet):
            activated = logits(model)
        assert torch.equal(logits(model), dense)
        cut = copy.deepcopy(model)
        anatomy_of(cut, example=IMAGES)
        left = extract(cut, anatomy, subnet)
        assert close(logits(cut), activated)
        assert sum(p.numel() for p in cut.parameters()) == parameters(anatomy, subnet) == parameters(left)
        with FlopCounterMode(display=False) as counter:
            logits(cut, IMAGES[:1])
        assert counter.get_total_flops() == 2 * macs(anatomy, subnet) == 2 * macs(left)
        if name in HUB:
            write(cut)
            cut.save_pretrained(tmp_path / "cut")
            reloaded, told = AutoModelForImageClassification.from_pretrained(tmp_path / "cut", output_loading_info=True)
            assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert close(logits(reloaded), activated)

    holds()


@pytest.mark.parametrize("name", NETS)
def test_any_walk_through_subnets_computes_the_same_as_going_there_at_once(name):
    model, anatomy = read(name)
    dense = logits(model)
    elastic, fresh = Elastic(model, anatomy), Elastic(*read(name))

    @few(name, 6)
    @given(data=st.data())
    def holds(data):
        for _ in range(3):
            elastic.activate(data.draw(subnets(anatomy)))
            fresh.activate(Subnet())
            fresh.activate(elastic.active)
            assert torch.equal(logits(model), logits(fresh.model))

    holds()
    elastic.activate(Subnet())
    assert torch.equal(logits(model), dense)


def test_a_block_that_comes_back_is_as_narrow_as_the_others_on_its_axis():
    model, anatomy = read("resnet_basic")
    stem = "resnet.embedder.embedder.convolution.channels"
    narrow = Subnet().keeping(stem, 5)
    elastic = Elastic(model, anatomy)
    elastic.activate(narrow.without("resnet.encoder.stages.0.layers.1"))
    elastic.activate(narrow)
    there = logits(model)
    elastic.activate(Subnet())
    elastic.activate(narrow)
    assert torch.equal(logits(model), there)


@pytest.mark.parametrize("name", NETS)
def test_gradients_flow_into_the_kept_part_of_the_full_tensors(name):
    model, anatomy = read(name)
    full = dict(model.named_parameters())
    subnet = everything_less(anatomy)
    with pliant.activate(model, subnet):
        out = model(IMAGES)
        (out if isinstance(out, torch.Tensor) else out.logits).square().mean().backward()
    used = 0
    for block in anatomy.blocks.values():
        kept = subnet.kept(block)
        for weight in block.weights:
            if weight.buffer:
                continue
            dropped = torch.ones(full[weight.path].shape, dtype=torch.bool)
            inside = torch.ones(())
            for place, dim in enumerate(weight.dims):
                mask = torch.cat([torch.arange(block.width(p, {})) < block.width(p, kept) for p in dim])
                inside = inside[..., None] * mask if place else mask.float()
            dropped = inside == 0
            assert not full[weight.path].grad[dropped].any()
            used += bool(full[weight.path].grad[~dropped].any())
    assert used > 0.8 * len(full)


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v2", "plain_resnet", "excite", "dense"])
def test_batch_norms_in_training_update_the_kept_part_of_the_full_statistics(name):
    model, anatomy = read(name)
    before = {path: buffer.clone() for path, buffer in model.named_buffers() if buffer.dim()}
    subnet = everything_less(anatomy)
    with pliant.activate(model, subnet):
        model.train()
        model(IMAGES)
        model.eval()
        narrowed = logits(model)
    after = dict(model.named_buffers())
    for block in anatomy.blocks.values():
        for weight in block.weights:
            if weight.buffer:
                kept = subnet.kept(block)
                stays = torch.cat([torch.arange(block.width(p, {})) < block.width(p, kept) for p in weight.dims[0]])
                assert torch.equal(after[weight.path][~stays], before[weight.path][~stays])
                assert (after[weight.path][stays] != before[weight.path][stays]).all()
    with pliant.activate(model, subnet):
        assert torch.equal(logits(model), narrowed)


def members(anatomy, axis):
    """The dimensions of matrices that an axis is on, as ``path:dimension``."""
    return {
        f"{weight.path.removesuffix('.weight')}:{place}"
        for block in anatomy.blocks.values()
        for weight in block.weights
        if weight.reads is not None
        for place, dim in enumerate(weight.dims)
        if any(part.axis in block.axes and block.axes[part.axis].name == axis for part in dim)
    }


def prefixed(prefix, paths):
    return {f"{prefix}{path}" for path in paths.split()}


def test_the_groups_of_a_resnet_are_those_that_its_shortcuts_make():
    _, anatomy = read("resnet_basic")
    e, s = "resnet.embedder.embedder.", "resnet.encoder.stages."
    expected = {
        f"{e}convolution.channels": {f"{e}convolution:0"}
        | prefixed(f"{s}0.layers.", "0.layer.0.convolution:1 0.layer.1.convolution:0")
        | prefixed(f"{s}0.layers.", "1.layer.0.convolution:1 1.layer.1.convolution:0")
        | prefixed(f"{s}1.layers.0.", "layer.0.convolution:1 shortcut.convolution:1"),
        f"{s}0.layers.0.layer.0.convolution.channels": prefixed(
            f"{s}0.layers.0.layer.", "0.convolution:0 1.convolution:1"
        ),
        f"{s}0.layers.1.layer.0.convolution.channels": prefixed(
            f"{s}0.layers.1.layer.", "0.convolution:0 1.convolution:1"
        ),
        f"{s}1.layers.0.layer.0.convolution.channels": prefixed(
            f"{s}1.layers.0.layer.", "0.convolution:0 1.convolution:1"
        ),
        f"{s}1.layers.1.layer.0.convolution.channels": prefixed(
            f"{s}1.layers.1.layer.", "0.convolution:0 1.convolution:1"
        ),
        f"{s}1.layers.0.layer.1.convolution.channels": prefixed(
            f"{s}1.layers.", "0.layer.1.convolution:0 0.shortcut.convolution:0"
        )
        | prefixed(f"{s}1.layers.", "1.layer.0.convolution:1 1.layer.1.convolution:0")
        | {"classifier.1:1"},
    }
    assert {axis: members(anatomy, axis) for axis in anatomy.axes} == expected
    assert {axis.size for axis in anatomy.axes.values()} == {8, 12}
    removable = [block.name for block in anatomy.blocks.values() if block.removable]
    assert removable == [f"{s}0.layers.0", f"{s}0.layers.1", f"{s}1.layers.1"]


def test_the_groups_of_a_bottleneck_resnet():
    _, anatomy = read("resnet_bottleneck")
    s = "resnet.encoder.stages.0.layers."
    assert members(anatomy, f"{s}0.layer.2.convolution.channels") == prefixed(
        s, "0.layer.2.convolution:0 0.shortcut.convolution:0 1.layer.0.convolution:1 1.layer.2.convolution:0"
    ) | prefixed("resnet.encoder.stages.1.layers.0.", "layer.0.convolution:1 shortcut.convolution:1")
    assert members(anatomy, f"{s}1.layer.1.convolution.channels") == prefixed(
        s, "1.layer.1.convolution:0 1.layer.2.convolution:1"
    )
    assert [b.name for b in anatomy.blocks.values() if b.removable] == [f"{s}1", "resnet.encoder.stages.1.layers.1"]


def test_the_groups_of_mobilenet_v2_run_through_depthwise_convolutions():
    _, anatomy = read("mobilenet_v2")
    m = "mobilenet_v2.layer."
    assert members(anatomy, f"{m}3.expand_1x1.convolution.channels") == prefixed(
        f"{m}3.", "expand_1x1.convolution:0 conv_3x3.convolution:0 reduce_1x1.convolution:1"
    )
    stream = prefixed(m, "2.reduce_1x1.convolution:0 5.expand_1x1.convolution:1")
    for layer in (3, 4):
        stream |= prefixed(f"{m}{layer}.", "expand_1x1.convolution:1 reduce_1x1.convolution:0")
    assert members(anatomy, f"{m}2.reduce_1x1.convolution.channels") == stream
    skipped = [int(b.name.removeprefix(m)) for b in anatomy.blocks.values() if b.removable]
    assert skipped == [1, 3, 4, 6, 7, 8, 10, 11, 13, 14]  # stride 1, as many channels out as in


def test_concatenated_flattened_gated_and_shared_channels():
    parts = {
        (name, weight.path): weight.dims
        for name in ("dense", "flat", "excite", "shared")
        for block in read(name)[1].blocks.values()
        for weight in block.weights
    }

    def dim(name, path, place):
        return [(part.axis, part.factor) for part in parts[name, path][place]]

    stem, first, second = "stem.channels", "convs.0.channels", "convs.1.channels"
    assert dim("dense", "convs.1.weight", 1) == [(stem, 1), (first, 1)]
    assert dim("dense", "fc.weight", 1) == [(stem, 1), (first, 1), (second, 1), ("3", 1)]
    assert dim("dense", "norms.2.running_var", 0) == dim("dense", "fc.weight", 1)
    assert dim("flat", "classifier.0.weight", 1) == [("features.3.channels", 6)]
    assert dim("flat", "features.1.weight", 0) == [("features.0.channels", 1)]
    for path, place in (("depthwise", 0), ("squeeze", 1), ("excite", 0), ("project", 1)):
        assert dim("excite", f"blocks.0.{path}.weight", place) == [("blocks.0.expand.channels", 2)]
    assert dim("excite", "grouped.weight", 0) == [("8", 1)]
    assert dim("excite", "narrow.weight", 0) == [("4", 1)]
    assert dim("shared", "twice.0.weight", 1) == dim("shared", "twice.3.weight", 0) == [(stem, 1)]
    assert dim("shared", "scale", 0) == [(stem, 1)]


def test_the_same_model_is_traced_once_and_what_is_left_of_it_again():
    model, anatomy = read("plain_resnet")
    assert anatomy_of(model) is anatomy
    left = extract(model, anatomy, Subnet().without("layer1.1").keeping("conv1.channels", 5))
    assert anatomy_of(model) is left
    assert left.axes["conv1.channels"].size == 5
    assert "layer1.1" not in left.blocks
    again = extract(model, left, Subnet().without("layer1.0").keeping("conv1.channels", 3))
    check(model, again)
    assert model.conv1.out_channels == model.bn1.num_features == model.layer2[0].conv1.in_channels == 3


def test_tracing_leaves_every_module_in_its_mode():
    model = net("plain_resnet").train()
    model.bn1.eval()
    anatomy_of(model, example=IMAGES)
    check(model)
    assert model.training
    assert model.layer1.training
    assert not model.bn1.training


class GeluResNet(nn.Module):
    """After its additions runs what is not the identity on what flows there."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Basic(4, 4, 1)
        self.block.relu = nn.GELU()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.block(F.gelu(self.stem(x))).mean((2, 3)))


class Signed(GeluResNet):
    """What flows into its block has negative numbers, which the ReLU after the addition would take away."""

    def __init__(self):
        super().__init__()
        self.block.relu = nn.ReLU()

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Watched(nn.Module):
    """Looks at a weight inside its block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Basic(4, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.block(F.relu(self.stem(x)))
        return self.fc(x.mean((2, 3))) + self.block.bn2.weight.sum()


@pytest.mark.parametrize("model", [GeluResNet(), Signed(), Watched()], ids=lambda model: type(model).__name__)
def test_a_module_that_cannot_be_skipped_is_not_offered(model):
    anatomy = anatomy_of(model, example=IMAGES)
    assert list(anatomy.blocks) == ["rest"]
    check(model, anatomy)


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.one = nn.Conv2d(6, 6, 3, bias=False)
        self.other = nn.Conv2d(6, 6, 3, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.head(self.other(self.one(self.stem(x)).relu())).mean((2, 3)))


def test_a_weight_that_two_modules_hold_is_not_cut():
    model = Tied()
    anatomy = anatomy_of(model, example=IMAGES)
    assert set(anatomy.axes) == {"head.channels"}
    check(model, anatomy)
    assert parameters(anatomy) == sum(p.numel() for p in model.parameters())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        x = self.stem(x).flatten(2)
        return (x @ x.transpose(1, 2)).flatten(1)


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.conv2d(x, self.stem.weight - self.stem.weight.mean()).mean((2, 3))


class Literal(nn.Module):
    """Has the number of its channels in its code."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)).view(-1, 6))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Attends(), "matmul, whose cost no weight accounts for"),
        (Standardised(), "computes its weights while it runs"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 5)), "pass an example that it runs on"),
        (nn.Sequential(nn.Conv1d(3, 4, 3)), "is unknown; pass an example"),
        (nn.Linear(3, 4), "and no convolutions to trace"),
    ],
    ids=["attention", "computed weights", "wrong size", "no images", "no convolutions"],
)
def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(model, told):
    with pytest.raises(ArchitectureError, match=told):
        anatomy_of(model)


def test_a_trace_that_does_not_hold_is_refused_with_the_reason():
    model = Literal()
    with pytest.raises(ArchitectureError, match="with units cut it does not run"):
        check(model, anatomy_of(model, example=IMAGES))


@pytest.mark.parametrize(
    ("subnet", "told"),
    [
        (Subnet().without("rest"), "rest cannot be removed"),
        (Subnet().without("layer1"), "no block 'layer1'"),
        (Subnet().keeping("conv1.channels", 9), "1 to 8"),
        (Subnet(frozenset({"layer1.0"}), (("layer1.0.conv1.channels", 3),)), "its block is skipped"),
    ],
)
def test_an_impossible_subnet_is_refused(subnet, told):
    with pytest.raises(SubnetError, match=told):
        validate(subnet, read("plain_resnet")[1])


def test_what_was_kept_of_a_shared_axis_stays_when_a_block_goes():
    kept = Subnet().keeping("conv1.channels", 4).keeping("layer1.0.conv1.channels", 3)
    subnet = kept.without("layer1.0")
    assert subnet.keep == (("conv1.channels", 4),)
    validate(subnet, read("plain_resnet")[1])


STOCK = """
import sys
sys.modules["pliant"] = None
import transformers
for folder in sys.argv[1:]:
    for kind in ("AutoModelForImageClassification", "AutoModel", "ResNetForImageClassification"):
        try:
            getattr(transformers, kind).from_pretrained(folder)
        except Exception as error:
            print(kind, "refused:", error)
"""


def test_transformers_alone_refuses_what_was_cut(tmp_path):
    cuts = {
        "gone": Subnet().without("resnet.encoder.stages.0.layers.1"),
        "narrower": Subnet().keeping("resnet.encoder.stages.0.layers.1.layer.0.convolution.channels", 3),
    }
    for name, subnet in cuts.items():
        model, anatomy = read("resnet_basic")
        extract(model, anatomy, subnet)
        write(model)
        model.save_pretrained(tmp_path / name)
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK, *(str(tmp_path / name) for name in cuts)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("refused:") == 6
    assert told.stdout.count("mismatch") + told.stdout.count("ignore_mismatched_sizes") >= 6


def test_a_cut_model_reloads_without_its_head_too_and_writes_the_same_config(tmp_path):
    model, anatomy = read("resnet_basic")
    subnet = everything_less(anatomy).without("resnet.encoder.stages.1.layers.1")
    extract(model, anatomy, subnet)
    write(model)
    model.save_pretrained(tmp_path / "cut")
    base = AutoModel.from_pretrained(tmp_path / "cut")
    with torch.inference_mode():
        assert torch.equal(base(IMAGES).last_hidden_state, model.resnet(IMAGES).last_hidden_state)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "cut")
    anatomy_of(again, example=IMAGES)
    write(again)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "cut/config.json").read_text() == (tmp_path / "again/config.json").read_text()
    fresh = AutoModelForImageClassification.from_config(again.config)  # random weights, the shapes of the cut one
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_dense_model_is_written_as_it_was(tmp_path):
    model, _ = read("resnet_basic")
    model.save_pretrained(tmp_path / "before")
    write(model)
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()


def test_a_plain_module_may_keep_a_config_of_its_own():
    model = net("plain_resnet")
    model.config = {"widths": [8, 12]}
    before = sum(p.numel() for p in model.parameters())
    pliant.apply(model, pliant.ChannelPruner(ratio=0.2), progress=False)
    assert sum(p.numel() for p in model.parameters()) <= 0.8 * before
