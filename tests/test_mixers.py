"""Mamba mixers beside attention or between it: falcon_h1, jamba and granitemoehybrid."""

import pytest
import torch
from transformers.models.falcon_h1 import modeling_falcon_h1

import pliant
from pico import IDS, config, head_of, logits, pico
from pliant.anatomy import anatomy_of
from pliant.checkpoint.per_layer_config import write
from pliant.elastic import Subnet, check, extract
from pliant.errors import ArtefactError
from pliant.exporters.homogeneous import homogeneous
from pliant.prune.scan_skip import scan_axis, scans_of
from pliant.runtime.packed_linear import Packed
from pliant.train.trunk_and_head import Halves

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about kernels that are not installed
SCANS = hasattr(modeling_falcon_h1, "mamba2_chunk_scan")  # in older versions a scan cannot lose its state


def check_generation(model, mask=None):
    """Cached generation is that without a cache."""
    if model.config.model_type == "falcon_h1" and not SCANS:  # there its cache is wrong, also in the dense model
        return
    mask = torch.ones_like(IDS) if mask is None else mask
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(IDS, attention_mask=mask, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached)


def saved_and_loaded(model, folder):
    write(model)
    model.save_pretrained(folder)
    return head_of(model.config.model_type).from_pretrained(folder).eval()


PARALLEL = {
    "the first mixer": ["layers.0.mamba"],
    "the first attention": ["layers.0.attention"],
    "both of the first layer": ["layers.0.mamba", "layers.0.attention"],
    "both of the last layer": ["layers.3.mamba", "layers.3.attention"],
    "all mixers but the last": [f"layers.{layer}.mamba" for layer in range(3)],
    "all attention but the last": [f"layers.{layer}.attention" for layer in range(3)],
    "one of each in turn": ["layers.0.mamba", "layers.1.attention", "layers.2.mamba", "layers.3.attention"],
}


@pytest.mark.parametrize("kind", PARALLEL)
def test_mixers_and_attention_in_parallel_go_alone_or_together(kind, tmp_path):
    model = pico("falcon_h1")
    anatomy, subnet = anatomy_of(model), Subnet().without(*PARALLEL[kind])
    with pliant.activate(model, subnet):
        activated = logits(model)
    extract(model, anatomy, subnet)
    again = saved_and_loaded(model, tmp_path)
    for cut in (model, again):
        torch.testing.assert_close(logits(cut), activated, rtol=0, atol=5e-6)
        check_generation(cut)
        assert all(list(layer.input_layernorm.parameters()) for layer in cut.model.layers)


@pytest.mark.parametrize("norm", [{}, {"mamba_rms_norm": False}, {"mamba_norm_before_gate": True}])
def test_multipliers_follow_their_mixers(norm, tmp_path):
    model = pico("falcon_h1", **norm)
    anatomy = anatomy_of(model)
    subnet = Subnet().keeping("layers.0.mamba.scan", 4).keeping("layers.1.mamba.state", 3).without("layers.2.mamba")
    state = 0 if SCANS else 1
    subnet = subnet.keeping("layers.3.mamba.scan", 10).keeping("layers.3.mamba.state", state)
    dense = model.model.layers[0].mamba.mup_vector.clone()
    with pliant.activate(model, subnet):
        assert model.model.layers[0].mamba.mup_vector.shape == (1, 1, 2 * 32 + 2 * 20 + 4)
        activated = logits(model)
    assert torch.equal(model.model.layers[0].mamba.mup_vector, dense)
    extract(model, anatomy, subnet)
    again = saved_and_loaded(model, tmp_path)
    sizes = {0: (32, 32, 20, 20, 4), 1: (96, 96, 6, 6, 12), 3: (80, 80, 2 * state, 2 * state, 10)}
    for layer, of_parts in sizes.items():
        expected = torch.cat([torch.full((n,), x) for n, x in zip(of_parts, model.config.ssm_multipliers, strict=True)])
        for cut in (model, again):
            assert torch.equal(cut.model.layers[layer].mamba.mup_vector.flatten(), expected)
    torch.testing.assert_close(logits(again), activated, rtol=0, atol=5e-6)
    extract(again, anatomy_of(again), Subnet().keeping("layers.0.mamba.scan", 2))  # cut again, and read again
    twice = saved_and_loaded(again, tmp_path / "twice")
    torch.testing.assert_close(logits(twice), logits(again), rtol=0, atol=5e-6)


def test_dense_models_get_the_multipliers_of_their_config(tmp_path):
    model = pico("falcon_h1")
    model.save_pretrained(tmp_path)
    again = head_of("falcon_h1").from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].mamba.mup_vector.unique().tolist() == sorted(config("falcon_h1").ssm_multipliers)


@pytest.mark.parametrize("name", ["granitemoehybrid", "falcon_h1", "jamba"])
def test_padded_prompts_are_continued_from_the_cache(name):
    model = pico(name)
    first = next(block.name for block in anatomy_of(model).blocks.values() if block.spec.state)
    extract(model, anatomy_of(model), Subnet().without(first))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    check_generation(model, mask)


@pytest.mark.parametrize("rank", [0, 3] if SCANS else [3])
@pytest.mark.parametrize("state", [0, 2] if SCANS else [2])
def test_narrower_norms_of_the_step_and_of_b_and_c_equal_zeroed_units(rank, state, tmp_path):
    model, zeroed = pico("jamba"), pico("jamba")
    mixer = zeroed.model.layers[0].mamba
    with torch.no_grad():
        rows = mixer.x_proj.weight.split([5, 6, 6])
        for part, kept in zip(rows, (rank, state, state), strict=True):
            part[kept:] = 0
    subnet = Subnet().keeping("layers.0.mamba.rank", rank).keeping("layers.0.mamba.state", state)
    with pliant.activate(model, subnet):
        torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-5)
        activated = logits(model)
    assert model.model.layers[0].mamba.dt_layernorm.variance_epsilon == zeroed.config.rms_norm_eps
    extract(model, anatomy_of(model), subnet)
    again = saved_and_loaded(model, tmp_path)
    torch.testing.assert_close(logits(again), activated, rtol=0, atol=5e-6)
    check_generation(again)
    check(again)


def test_a_layer_that_is_never_called_is_not_packed(tmp_path):
    model = pico("jamba")
    before = logits(model)
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    packed = logits(model)
    torch.testing.assert_close(packed, before, rtol=0, atol=0.1 * before.abs().max().item())
    skipped = {kind["why"]: kind["names"] for kind in model.pliant_history[-1]["left"]["reasons"]}
    names = skipped["linear layers whose weight is read by their block, which never calls them"]
    assert names == ["model.layers.0.mamba.dt_proj", "model.layers.2.mamba.dt_proj"]
    assert isinstance(model.model.layers[0].mamba.in_proj, Packed)
    model.save_pretrained(tmp_path)
    again = logits(head_of("jamba").from_pretrained(tmp_path).eval())
    torch.testing.assert_close(again, packed, rtol=1e-5, atol=1e-5)  # transformers adds a bias there and subtracts it


@pytest.mark.parametrize("name", ["granitemoehybrid", "falcon_h1"])
def test_heads_that_scale_their_logits_can_be_trained(name):
    model = pico(name)
    halves, mask = Halves(model), torch.ones_like(IDS)
    hidden = halves.trunk(IDS, mask)
    torch.testing.assert_close(halves.head(hidden[0]), logits(model)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [{}, {"output_router_logits": True}])
@pytest.mark.skipif(not SCANS, reason="the scan of this transformers cannot lose its state")
def test_experts_are_balanced_beside_a_scan_without_a_state(kept):
    model = pico("granitemoehybrid")
    extract(model, anatomy_of(model), Subnet().keeping("layers.0.mamba.state", 0).keeping("layers.1.moe.experts", 2))
    output = model(IDS, labels=IDS, **kept)
    assert output.loss.isfinite()
    assert (output.aux_loss is not None) == bool(kept)


@pytest.mark.parametrize(("name", "layer"), [("granitemoehybrid", 2), ("falcon_h1", 1)])
def test_a_model_without_whole_layers_is_exported(name, layer):
    model = pico(name)
    anatomy = anatomy_of(model)
    gone = [block.name for block in anatomy.blocks.values() if block.layer == layer]
    keep = {
        f"layers.{other}.mamba.state": 3 for other in range(4) if f"layers.{other}.mamba" in {*anatomy.blocks} - {*gone}
    }
    extract(model, anatomy, Subnet(frozenset(gone), tuple(sorted(keep.items()))))
    exported = homogeneous(model)
    assert exported.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(exported), logits(model), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [([2], "computes layer_types from the number of a layer"), ([0, 1], "gives the remaining layers other parts")],
)
def test_layers_that_the_config_computes_from_their_number_are_not_dropped(layers, reason):
    model = pico("jamba")
    anatomy = anatomy_of(model)
    extract(model, anatomy, Subnet().without(*(b.name for b in anatomy.blocks.values() if b.layer in layers)))
    with pytest.raises(ArtefactError, match=f"{reason}.*use the cut folder"):
        homogeneous(model)


@pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function")
@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba2"])
def test_a_model_without_any_scan_is_not_exported(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    subnet = Subnet()
    for block in scans_of(anatomy):
        subnet = subnet.keeping(scan_axis(block).name, 0)
    extract(model, anatomy, subnet)
    with pytest.raises(ArtefactError, match=r"would be 0, because every scan is removed.*use the cut folder"):
        homogeneous(model)
