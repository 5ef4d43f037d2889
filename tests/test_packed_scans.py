"""Packed projections of state-space models and hybrids: where a layer is called, never where its weight is read."""

import pytest
import torch

import pliant
from pico import FAMILIES, IDS, SCANS, logits, pico
from pliant.anatomy import anatomy_of, layers_of
from pliant.architecture import catalogue
from pliant.errors import StepError
from pliant.runtime import packed_weight
from pliant.runtime.packed_linear import Packed
from pliant.values.matrix import UNCALLED

WITH_SCANS = [name for name in FAMILIES if any("scan" in block.state for block in catalogue()[name].blocks)]
pytestmark = pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function")
MAMBA_1 = [name for name in WITH_SCANS if any(block.uncalled for block in catalogue()[name].blocks)]


def packed(model, **settings):
    return pliant.apply(model, pliant.PackedLinear(**settings), progress=False)


@pytest.fixture
def never_unpacked(monkeypatch):
    """Fails as soon as code reads the values of a packed layer instead of calling it."""

    def unpack(_):
        raise AssertionError("the weight of a packed layer was read")

    monkeypatch.setattr(packed_weight, "unpack", unpack)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_SCANS)
@pytest.mark.usefixtures("never_unpacked")
def test_a_packed_model_generates_and_reloads_and_no_weight_is_read(name, dtype, tmp_path):
    dense = pico(name)
    with torch.no_grad():  # values that bf16 holds exactly, so that packing rounds nothing
        for parameter in dense.parameters():
            parameter.copy_(parameter.bfloat16())
    dense.save_pretrained(tmp_path / "dense")
    dense = pliant.load(tmp_path / "dense", dtype=dtype)
    expected = logits(dense)
    decays = {path: value.clone() for path, value in dense.named_parameters() if path.endswith("A_log")}
    model = packed(dense, format="bf16", head="bf16")
    assert all(torch.equal(model.get_parameter(path), value) for path, value in decays.items())
    found = logits(model)
    share = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=share * expected.abs().max().item())
    model.train()  # mixers then offer their weights to a kernel that transformers does not have on a CPU
    assert torch.equal(logits(model), found)
    model.eval()
    wanted = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = model.generate(IDS, pad_token_id=0, **wanted)
    if dtype == torch.float32:
        assert written.equal(model.generate(IDS, pad_token_id=0, use_cache=False, **wanted))
    model.save_pretrained(tmp_path / "packed")
    again = pliant.load(tmp_path / "packed")
    assert torch.equal(logits(again), found)
    assert written.equal(again.generate(IDS, pad_token_id=0, **wanted))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_SCANS)
def test_architecture_files_list_the_layers_that_are_read_and_never_called(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    layers = layers_of(model, anatomy.source)
    called = set()
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            module.register_forward_pre_hook(lambda *_, where=(index, path): called.add(where))
    logits(model)
    linear = [
        (block.layer, weight.path.removesuffix(".weight"), weight.called)
        for block in anatomy.blocks.values()
        for weight in block.weights
        if isinstance(layers[block.layer].get_submodule(weight.path.rpartition(".")[0]), torch.nn.Linear)
        and weight.path.endswith(".weight")
    ]
    assert {(layer, path): listed for layer, path, listed in linear} == {
        (layer, path): (layer, path) in called for layer, path, _ in linear
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAMBA_1)
def test_a_layer_that_is_read_stays_and_the_step_says_so(name):
    model = packed(pico(name), format="int8", target_modules="all-linear")
    (reason,) = [kind for kind in model.pliant_history[0]["left"]["reasons"] if kind["why"] == UNCALLED]
    steps = [
        path for path, module in model.named_modules() if path.endswith("dt_proj") and not isinstance(module, Packed)
    ]
    assert reason["names"] == steps
    assert len(steps) == sum(block.role == "scan" for block in anatomy_of(model).blocks.values())
    assert isinstance(model.get_submodule(steps[0].replace("dt_proj", "x_proj")), Packed)
    with pytest.raises(StepError, match=r"can change none of the linear layers: .* whose weight is read"):
        packed(pico(name), target_modules=["dt_proj"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [pliant.RTN(bits=8), pliant.Magnitude(sparsity=0.5)])
@pytest.mark.parametrize("name", MAMBA_1)
def test_steps_on_values_change_layers_that_are_read_and_leave_the_decay(name, step):
    model = pico(name)
    before = {path: value.clone() for path, value in model.named_parameters()}
    pliant.apply(model, step, progress=False)
    after = dict(model.named_parameters())
    assert not any(after[path].equal(value) for path, value in before.items() if path.endswith("dt_proj.weight"))
    assert all(after[path].equal(value) for path, value in before.items() if path.endswith(("A_log", "conv1d.weight")))
    assert logits(model).isfinite().all()
