"""State-space models are cut: heads, channels and states, scans without a state, searches and pruners."""

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import pliant
from pico import IDS, SCANS, logits, pico, tokenizer
from pliant.anatomy import Weight, anatomy_of
from pliant.architecture.format import Part
from pliant.compat.scan import wrap_scans
from pliant.elastic import Subnet, check, extract, reorder
from pliant.elastic.activate import give_back, narrow
from pliant.errors import ArchitectureError

pytestmark = pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1"])
def test_the_models_run_the_scan_of_pliant(name, monkeypatch):
    model = pico(name)
    modeling = importlib.import_module(type(model).__module__)
    expected = logits(model)

    def theirs(*_, **__):
        raise AssertionError("the scan of transformers was called")

    monkeypatch.setattr(modeling, "mamba2_chunk_scan", theirs)
    wrap_scans(modeling)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["mamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1", "jamba", "zamba2"]
)
def test_without_a_state_the_skip_and_the_gate_stay_and_generation_is_cached(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    block = next(block for block in anatomy.blocks.values() if block.role == "scan")
    subnet = Subnet().keeping(f"{block.name}.state", 0)
    zeroed = pico(name)
    mixer = zeroed.get_submodule(f"{anatomy.architecture.layers}.{block.layer}.{block.spec.module}")
    with torch.no_grad():  # B reads nothing: the state stays 0
        if hasattr(mixer, "x_proj"):
            mixer.x_proj.weight[mixer.time_step_rank :][: mixer.ssm_state_size].zero_()
        else:
            width = mixer.intermediate_size
            mixer.conv1d.weight[width : width + 20].zero_()
            mixer.conv1d.bias[width : width + 20].zero_()
    extract(model, anatomy, subnet)
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-4)
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, uncached = (model.generate(IDS, pad_token_id=0, use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1", "zamba2"])
def test_without_a_state_no_rows_for_step_sizes_remain_however_the_mixer_is_run(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    block = next(block for block in anatomy.blocks.values() if block.role == "scan")
    extract(model, anatomy, Subnet().keeping(f"{block.name}.state", 0))
    mixer = model.get_submodule(f"{anatomy.architecture.layers}.{block.layer}.{block.spec.module}")
    assert len(mixer.in_proj.weight) == 2 * mixer.intermediate_size
    assert [mixer.A_log.numel(), mixer.dt_bias.numel(), mixer.D.numel()] == [0, 0, mixer.num_heads]
    expected = logits(model)
    for module in model.modules():  # in training mode, transformers tries its fused pass first
        module.training = module is mixer
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    assert mixer.training
    assert not mixer.in_proj._forward_hooks
    with ThreadPoolExecutor(4) as threads:
        assert all(out.equal(expected) for out in threads.map(lambda _: logits(model), range(8)))


def test_units_stay_in_their_groups():
    model = pico("mamba2")
    anatomy = anatomy_of(model)
    axis = anatomy.axes["layers.0.mamba.scan"]
    assert (axis.size, axis.groups, axis.multiple) == (8, 2, 2)
    with pytest.raises(pliant.PliantError, match="moves units into another of its 2 groups"):
        reorder(model, anatomy, {axis.name: torch.arange(8).flip(0)})
    assert pliant.importance(model)[axis.name].shape == (8,)


FAMILIES = (
    "mamba",
    "falcon_mamba",
    "mamba2",
    "bamba",
    "nemotron_h",
    "granitemoehybrid",
    "falcon_h1",
    "jamba",
    "zamba2",
)
PRUNED = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_search_reuses_prefixes_and_removes_what_a_naive_one_does(name):
    found = []
    for search in ("naive", "exact"):
        step = pliant.BlockPruner(ratio=0.1, samples=4, seqlen=24, search=search, repair=4)
        model = pliant.apply(pico(name), step, PRUNED, tokenizer=tokenizer(), progress=False)
        found.append(model.pliant_history[0]["subnet"])
    assert found[0] == found[1]
    assert found[0]["skip"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("step", [pliant.MultiPruner, pliant.UnifiedPruner, pliant.FisherPruner, pliant.KnapsackPruner])
def test_every_family_is_narrowed_to_the_ratio(name, step):
    model = pico(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    pliant.apply(model, step(ratio=0.1, samples=4, seqlen=24), PRUNED, tokenizer=tokenizer(), progress=False)
    assert 0.1 <= 1 - sum(parameter.numel() for parameter in model.parameters()) / before < 0.2
    assert logits(model).isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
def test_a_model_whose_state_is_gone_is_checked_and_cut_again(name):
    model = pico(name)
    extract(model, anatomy_of(model), Subnet().keeping("layers.0.mamba.state", 0))
    check(model)
    pliant.apply(model, pliant.ChannelPruner(ratio=0.1), progress=False)
    assert anatomy_of(model).axes["layers.0.mamba.state"].size == 0
    assert logits(model).isfinite().all()


def test_a_gathered_buffer_is_written_back_to_the_units_of_its_groups():
    block = anatomy_of(pico("mamba2")).blocks["layers.0.mamba"]
    weight = Weight("buffer", ((Part("scan"), Part("state")),), buffer=True)
    full, kept = torch.arange(64.0 + 20), {"scan": 4, "state": 3}
    part = narrow(full, block, weight, kept)
    expected = [*range(16), *range(32, 48), *range(64, 67), *range(74, 77)]
    assert part.tolist() == expected
    changed = full.clone()
    give_back(part + 100, changed, block, weight, kept)
    assert changed.tolist() == [value + 100 if value in expected else value for value in full.tolist()]
    weight = Weight("buffer", ((Part("one"),), *weight.dims), buffer=True)
    changed = full[None].clone()
    give_back(part[None] + 100, changed, block, weight, kept)
    assert changed.tolist() == [[value + 100 if value in expected else value for value in full.tolist()]]


def test_a_model_that_was_built_without_a_state_is_refused_with_a_sentence():
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, state_size=0, num_hidden_layers=2)
    with pytest.raises(ArchitectureError, match=r"x_proj.weight has shape \(2, 64\), but mamba.yaml describes shape"):
        anatomy_of(transformers.MambaForCausalLM(config))
