"""The scan of state-space models: the same numbers as transformers', with gradients, and scans without a state."""

import importlib

import pytest
import torch

import pliant
from pico import IDS, logits, pico
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, extract, reorder

SCANS = hasattr(importlib.import_module("transformers.models.mamba2.modeling_mamba2"), "mamba2_chunk_scan")
pytestmark = pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function")
SHAPES = {"two groups": (2, 37, 8, 8, 2, 12), "one chunk": (2, 5, 4, 4, 1, 3), "many chunks": (1, 200, 6, 16, 1, 32)}


def scan():
    """pliant's scan and that of transformers, as the mixers of mamba2 call them."""
    ours = importlib.import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    return ours, ours.__wrapped__


def arguments(shape, dtype=torch.float32):
    batch, tokens, heads, width, groups, state = shape
    draw = torch.Generator().manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, generator=draw).to(dtype).requires_grad_()

    given = [random(batch, tokens, heads, width), random(batch, tokens, heads), -torch.rand(heads, generator=draw) * 4]
    given += [random(batch, tokens, groups, state), random(batch, tokens, groups, state)]
    named = {"D": random(heads), "dt_bias": random(heads), "dt_softplus": True, "chunk_size": 16}
    named |= {"initial_states": random(batch, heads, width, state), "return_final_states": True, "z": None}
    return given, named | {"dt_limit": (0.0, 0.9)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_states_and_gradients_are_those_of_transformers(shape):
    results = []
    for function in scan():
        given, named = arguments(SHAPES[shape])
        output, state = function(*given, **named)
        leaves = [leaf for leaf in (*given, named["D"], named["initial_states"]) if leaf.requires_grad]
        results.append((output, state, *torch.autograd.grad(output.sum() + state.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_is_computed_as_precisely_as_by_transformers():
    results = [
        function(*given, **named)[0]
        for function in scan()
        for given, named in [arguments(SHAPES["two groups"], torch.bfloat16)]
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5 * results[1].abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_argument_goes_to_transformers():
    ours, _ = scan()
    given, named = arguments(SHAPES["one chunk"])
    with pytest.raises(ValueError, match="packed sequences"):
        ours(*given, **named, seq_idx=torch.zeros(2, 5, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "nemotron_h"])
def test_without_a_state_the_skip_and_the_gate_stay_and_generation_is_cached(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    block = next(block for block in anatomy.blocks.values() if block.role == "scan")
    subnet = Subnet().keeping(f"{block.name}.state", 0)
    zeroed = pico(name)
    mixer = zeroed.get_submodule(f"{anatomy.architecture.layers}.{block.layer}.{block.spec.module}")
    with torch.no_grad():  # B reads nothing: the state stays 0
        if name == "mamba":
            mixer.x_proj.weight[4:10].zero_()
        else:
            width = mixer.intermediate_size
            mixer.conv1d.weight[width : width + 20].zero_()
            mixer.conv1d.bias[width : width + 20].zero_()
    extract(model, anatomy, subnet)
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-4)
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, uncached = (model.generate(IDS, pad_token_id=0, use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_units_stay_in_their_groups():
    model = pico("mamba2")
    anatomy = anatomy_of(model)
    axis = anatomy.axes["layers.0.mamba.scan"]
    assert (axis.size, axis.groups, axis.multiple) == (8, 2, 2)
    with pytest.raises(pliant.PliantError, match="moves units into another of its 2 groups"):
        reorder(model, anatomy, {axis.name: torch.arange(8).flip(0)})
    assert pliant.importance(model)[axis.name].shape == (8,)
