"""Repair without training: the residual stream comes nearer to what it was."""

import pytest
import torch

import pliant
from pico import pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, extract
from pliant.forward.stream import Stream
from pliant.progress import Progress
from pliant.prune.repair import repair

TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
WINDOWS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(0))
REPAIRED = ["llama", "gpt2", "granite", "phi", "opt", "falcon", "bloom", "mixtral"]
NORMED = ["gemma2", "gemma3_text", "olmo2"]  # an RMS norm follows the last matrix of a block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*REPAIRED, *NORMED])
def test_repair_brings_the_stream_nearer_to_the_dense_one(family, dtype):
    model = pico(family).to(dtype)
    anatomy = anatomy_of(model)
    subnet = Subnet().without("layers.1.attention").without("layers.2.mlp")
    ids = torch.randint(3, 250, (16, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = Stream(model, anatomy).run(ids, 0, 4)[4]

    def distance():
        with pliant.activate(model, subnet), torch.inference_mode():
            return (Stream(model, anatomy).run(ids, 0, 4)[4] - wanted).float().square().mean().item()

    before = distance()
    told = {fit["block"]: fit["distance"] for fit in repair(model, anatomy, subnet, ids, 0.01, Progress())}
    assert all(fit["after"] <= fit["before"] + 1e-4 for fit in told.values() if fit)
    assert distance() < before * (0.6 if family in NORMED else 0.2)
    stacked = {"layers.0.mlp", "layers.1.mlp", "layers.3.mlp"} if family == "mixtral" else set()
    assert {block for block, fit in told.items() if fit is None} == stacked


SCANS = ["mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1", "jamba"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SCANS)
@pytest.mark.parametrize("cut", ["state", "width", "all of the state"])
def test_repair_brings_the_output_of_a_cut_scan_nearer_to_the_dense_one(family, cut):
    """Behind the scan are a gate and, in Mamba-2, a norm; kept heads are the first ones of every group."""
    model = pico(family)
    anatomy = anatomy_of(model)
    scans = [block for block in anatomy.blocks.values() if block.role == "scan"]
    ids = torch.randint(3, 250, (16, 64), generator=torch.Generator().manual_seed(1))
    subnet, layer = Subnet(), scans[-1].layer + 1
    for block in scans:
        state = block.state_axis
        width = next(axis for axis in block.leaders if axis.leader in ("scan", "channels"))
        axis, units = (width, width.size // 2) if cut == "width" else (state, state.size // 2 if cut == "state" else 0)
        subnet = subnet.keeping(axis.name, units)
    with torch.inference_mode():
        wanted = Stream(model, anatomy).run(ids, 0, layer)[layer]

    def distance():
        with torch.inference_mode():
            return (Stream(model, anatomy).run(ids, 0, layer)[layer] - wanted).float().square().mean().item()

    with pliant.activate(model, subnet):
        before = distance()
    fits = {fit["block"]: fit["distance"] for fit in repair(model, anatomy, subnet, ids, 0.01, Progress())}
    assert all(fits[block.name]["after"] <= fits[block.name]["before"] for block in scans)
    with pliant.activate(model, subnet):
        repaired = distance()
    assert repaired < 0.9 * before
    extract(model, anatomy, subnet)
    assert distance() == pytest.approx(repaired, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_repair_of_the_dense_model_changes_nothing(family):
    model, same = pico(family), pico(family)
    repair(model, anatomy_of(model), Subnet(), WINDOWS, 0.01, Progress())
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_an_interrupted_repair_leaves_the_model_as_it_was():
    class Stop(Progress):
        def step(self, share, *_):
            if share > 0.4:
                raise KeyboardInterrupt

    model, same = pico("llama"), pico("llama")
    with pytest.raises(KeyboardInterrupt):
        repair(model, anatomy_of(model), Subnet().without("layers.0.mlp"), WINDOWS, 0.01, Stop())
    assert all(a.equal(b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_repair_is_a_setting_of_every_pruner_and_is_told():
    step = pliant.BlockPruner(ratio=0.15, samples=4, seqlen=64, repair=8)
    model = pliant.apply(pico("llama"), step, TEXT, tokenizer=tokenizer(), progress=False)
    record = model.pliant_history[0]
    assert {fit["block"] for fit in record["repair"]} <= set(anatomy_of(pico("llama")).blocks)
    assert len(record["repair"]) == 8 - len(record["subnet"]["skip"])
