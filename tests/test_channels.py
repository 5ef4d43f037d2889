"""Channels pruned by the size of their weights; image classifiers loaded, inspected, written."""

import copy
import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import pliant
from convnets import IMAGES, logits, net
from pico import pico
from pliant.anatomy import Null, anatomy_of
from pliant.cli.main import app
from pliant.criteria import l1_norms
from pliant.elastic import Subnet, macs, parameters, ratio
from pliant.errors import ArtefactError, PliantError, RatioError
from pliant.step import settings_of


def given(name):
    """A convolutional network or a Transformer, and its anatomy."""
    if name == "llama":
        model = pico(name)
        return model, anatomy_of(model)
    model = net(name)
    return model, anatomy_of(model, example=IMAGES)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("wanted", [{"ratio": 0.3}, {"macs_ratio": 0.4}], ids=str)
@pytest.mark.parametrize("name", ["resnet_bottleneck", "mobilenet_v2", "dense", "excite", "flat", "llama"])
def test_the_ratio_is_met_within_one_group(name, wanted, allocation):
    model, anatomy = given(name)
    step = pliant.ChannelPruner(**wanted, allocation=allocation, group=2, minimum=0.2)
    subnet = step.choose(anatomy, l1_norms(model, anatomy))
    assert not subnet.skip
    for axis, units in subnet.keep:
        whole = anatomy.axes[axis]
        assert units * whole.unit % 2 == 0
        assert units >= 0.2 * whole.size

    def reached(subnet):
        return ratio(anatomy, subnet) if "ratio" in wanted else 1 - macs(anatomy, subnet) / macs(anatomy)

    (target,) = wanted.values()
    assert reached(subnet) >= target
    one_back = []
    for axis, units in subnet.keep:
        whole = anatomy.axes[axis]
        one_back.append(subnet.keeping(axis, min(units + max(1, 2 // whole.unit), whole.size)))
    assert min(reached(other) for other in one_back) < target


@pytest.mark.parametrize("name", ["resnet_basic", "dense", "llama"])
def test_what_stays_computes_what_was_there(name):
    model, anatomy = given(name)
    step = pliant.ChannelPruner(ratio=0.3, group=1)
    subnet = step.choose(anatomy, l1_norms(model, anatomy))
    pliant.apply(model, step, progress=False)
    (done,) = model.pliant_history
    assert done["subnet"] == subnet.to_dict()
    assert done["parameters_after"] == sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet)
    assert done["ratio"] == ratio(anatomy, subnet) >= 0.3
    assert done["settings"] == step.to_dict()


def test_the_smallest_filters_go_first():
    model = net("flat")
    small = [1, 4, 7]
    with torch.no_grad():
        model.features[3].weight[small] *= 1e-3
        model.features[3].bias[small] = 0
    reference = copy.deepcopy(model)
    anatomy = anatomy_of(model, example=IMAGES)
    l1 = l1_norms(model, anatomy)["features.3.channels"]
    assert set(l1.argsort()[:3].tolist()) == set(small)
    step = pliant.ChannelPruner(ratio=0.2, allocation="global", group=1)
    subnet = step.choose(anatomy, l1_norms(model, anatomy))
    assert dict(subnet.keep)["features.3.channels"] <= 7
    pliant.apply(model, step, progress=False)
    kept = model.features[3].weight
    assert all(any(torch.equal(f, g[: len(f)]) for g in _permuted(reference, kept.shape[1])) for f in kept)


def _permuted(reference, inputs):
    """The filters of the dense model, each with the inputs that were kept."""
    by_size = reference.features[0].weight.abs().sum((1, 2, 3)).argsort(descending=True)
    return reference.features[3].weight[:, by_size[:inputs]]


def test_the_same_share_of_every_axis_or_what_is_smallest_wherever():
    model = net("plain_resnet")
    with torch.no_grad():
        model.layer1[0].conv1.weight[:6] *= 1e-3
    anatomy = anatomy_of(model, example=IMAGES)
    norms = l1_norms(model, anatomy)

    def share(allocation):
        kept = dict(pliant.ChannelPruner(ratio=0.3, allocation=allocation, group=1).choose(anatomy, norms).keep)
        return {name: kept.get(name, axis.size) / axis.size for name, axis in anatomy.axes.items()}

    assert max(share("uniform").values()) - min(share("uniform").values()) <= 1 / 8
    assert share("global")["layer1.0.conv1.channels"] == 0.25


def test_a_shared_axis_matters_by_all_that_produces_it():
    model = net("plain_resnet")
    norm = l1_norms(model, anatomy_of(model, example=IMAGES))["layer2.0.conv2.channels"]
    producers = (model.layer2[0].conv2, model.layer2[0].downsample[0], model.layer2[1].conv2)
    expected = sum(conv.weight.double().abs().sum((1, 2, 3)) for conv in producers)
    assert torch.allclose(norm, expected)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "either ratio"),
        ({"ratio": 0.2, "macs_ratio": 0.2}, "not both"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"macs_ratio": -0.1}, "between 0 and 1"),
        ({"ratio": True}, "between 0 and 1"),
        ({"ratio": 0.2, "allocation": "local"}, "allocation must be one of uniform, global; not 'local'"),
        ({"ratio": 0.2, "group": 0}, "at least 1"),
        ({"ratio": 0.2, "minimum": 2}, "minimum must be a number from 0 to 1; not 2"),
    ],
)
def test_an_impossible_setting_is_refused(settings, told):
    with pytest.raises(PliantError, match=told):
        pliant.ChannelPruner(**settings)


def test_a_ratio_out_of_reach_leaves_the_model_alone():
    model, _ = given("resnet_basic")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RatioError, match="cannot be reached"):
        pliant.apply(model, pliant.ChannelPruner(ratio=0.9, minimum=0.5), progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_every_setting_has_a_help_text():
    settings = {field.name for field in dataclasses.fields(pliant.ChannelPruner)}
    assert settings <= set(settings_of(pliant.ChannelPruner))


@pytest.fixture
def folder(tmp_path):
    """A ResNet without one of its blocks, and narrower."""
    model, anatomy = given("resnet_basic")
    gone = "resnet.encoder.stages.1.layers.1"
    steps = [pliant.Cut(subnet=Subnet().without(gone)), pliant.ChannelPruner(ratio=0.3, group=1)]
    pliant.apply(model, steps, progress=False)
    pliant.save(model, tmp_path / "cut")
    assert isinstance(model.get_submodule(gone), Null)
    assert gone in anatomy.blocks
    return tmp_path / "cut", model


def test_an_image_classifier_is_loaded_with_its_head(folder):
    path, model = folder
    loaded = pliant.load(path)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not torch.equal(logits(loaded), torch.zeros(2, 5))


def test_a_sequence_classifier_is_loaded_with_its_head(tmp_path):
    model = pico("bert")
    model.save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path)
    stored, whole = loaded.state_dict(), model.state_dict()
    assert stored.keys() == whole.keys()
    assert "classifier.weight" in whole
    assert all(torch.equal(stored[name], tensor) for name, tensor in whole.items())
    ids = torch.tensor([[5, 17, 101]])
    with torch.inference_mode():  # where a tensor begins in memory, and so the last bit of a product, is the file's
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_a_record_that_does_not_fit_the_model_is_refused(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    config["pliant_shapes"]["removed"]["resnet.encoder.stages.9"] = {"residual": 0}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=r"'resnet\.encoder\.stages\.9'"):
        pliant.load(path)


def test_inspection_of_what_was_traced(folder):
    path, model = folder
    found = pliant.inspect(path)
    assert found["model_type"] == found["architecture"] == "resnet"
    assert found["self_check"] == "passed"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["macs_per_image"] == macs(anatomy_of(pliant.load(path)))
    assert not {"macs_per_token", "cache_bytes_per_token"} & set(found)
    assert found["removed"] == ["resnet.encoder.stages.1.layers.1"]
    blocks = {block["block"]: block for block in found["blocks"]}
    assert [name for name, block in blocks.items() if block["removable"]] == [
        "resnet.encoder.stages.0.layers.0",
        "resnet.encoder.stages.0.layers.1",
    ]
    stem = "resnet.embedder.embedder.convolution.channels"
    assert stem in blocks["rest"]["axes"]
    assert blocks["rest"]["axes"][stem] == blocks["resnet.encoder.stages.0.layers.0"]["axes"][stem]
    assert sum(block["parameters"] for block in blocks.values()) == found["parameters"]


def test_inspection_on_the_command_line(folder):
    path, _ = folder
    ended = CliRunner().invoke(app, ["inspect", str(path)])
    assert ended.exit_code == 0
    assert "multiply-accumulates per image" in ended.output
    assert "can be removed" in ended.output
    assert "cache" not in ended.output
    as_json = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(as_json.output)["removed"] == ["resnet.encoder.stages.1.layers.1"]


def test_a_plain_module_is_cut_in_memory_and_can_be_inspected():
    model, anatomy = given("plain_resnet")
    pliant.apply(model, pliant.ChannelPruner(macs_ratio=0.5, group=4), progress=False)
    found = pliant.inspect(model)
    assert found["model"] == "PlainResNet"
    assert found["macs_per_image"] <= 0.5 * macs(anatomy)
    assert {axis["units"] % 4 for block in found["blocks"] for axis in block["axes"].values()} == {0}
