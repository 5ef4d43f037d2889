"""Scans of state-space models on a CPU: the numbers of transformers, and its gradients, states and padded batches."""

import importlib

import pytest
import torch
from transformers import DynamicCache

from pico import IDS, SCANS, logits, pico
from pliant.compat.cache_argument import cache_argument
from pliant.compat.scan import watched_scan_inputs

pytestmark = pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function")
FAMILIES = ("mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h")
WIDE = {"mamba": {}, "falcon_mamba": {}, "mamba2": {"state_size": 72}, "bamba": {"mamba_d_state": 72}}
WIDE |= {"nemotron_h": {"ssm_state_size": 72}}  # so wide that pliant takes the decode step
LONG = {"mamba": {}, "mamba2": {"chunk_size": 64}}  # so long that pliant computes the gradients
SHAPES = {  # batch, tokens, heads, width, groups, state
    "two groups": (2, 37, 8, 8, 2, 12),
    "one token": (1, 1, 4, 4, 1, 3),
    "one chunk": (2, 5, 4, 4, 1, 3),
    "a full chunk": (1, 32, 4, 4, 2, 3),
    "a full chunk and a token": (3, 33, 4, 4, 2, 3),
    "many chunks": (1, 200, 6, 16, 1, 32),
}
CHANNELS = {"a chunk and more": (2, 70, 24, 6), "one token": (1, 1, 8, 3), "small chunks": (1, 11, 1024, 64)}


def functions(name, family="mamba2"):
    """A function of pliant and the one of transformers that it replaces."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    ours = getattr(module, name)
    return ours, ours.__wrapped__


def scan():
    return functions("mamba2_chunk_scan")


def numbers(dtype):
    draw = torch.Generator().manual_seed(0)
    return lambda *sizes: torch.randn(*sizes, generator=draw).to(dtype).requires_grad_()


def arguments(shape, dtype=torch.float32):
    """Of a scan of Mamba-2, as its mixer calls it."""
    batch, tokens, heads, width, groups, state = shape
    random = numbers(dtype)
    rates = (-torch.rand(heads, generator=torch.Generator().manual_seed(1)) * 4).requires_grad_()
    given = [random(batch, tokens, heads, width), random(batch, tokens, heads), rates]
    given += [random(batch, tokens, groups, state), random(batch, tokens, groups, state)]
    named = {"D": random(heads), "dt_bias": random(heads), "dt_softplus": True, "chunk_size": 64}
    named |= {"initial_states": random(batch, heads, width, state), "return_final_states": True, "z": None}
    return given, named | {"dt_limit": (0.0, 0.9)}


def channels(shape, dtype=torch.float32):
    """Of a scan of Mamba-1."""
    batch, tokens, width, state = shape
    random = numbers(dtype)
    rates = (-torch.rand(width, state, generator=torch.Generator().manual_seed(1)) * state).requires_grad_()
    given = [random(batch, width, tokens), random(batch, width, tokens), rates]
    given += [random(batch, state, tokens), random(batch, state, tokens)]
    named = {"D": random(width).float().detach().requires_grad_(), "z": random(batch, width, tokens)}
    named |= {"delta_bias": random(width).float().detach().requires_grad_(), "delta_softplus": True}
    return given, named | {"return_last_state": True, "use_mambapy": False, "use_associative_scan": True}


def step(shape, dtype=torch.float32):
    """Of a step of Mamba-2; the state is the first argument."""
    batch, heads, width, groups, state = shape
    random = numbers(dtype)
    rates = -torch.rand(heads, generator=torch.Generator().manual_seed(1)) * 4
    given = [random(batch, heads, width, state).float().detach(), random(batch, heads, width)]
    given += [random(batch, heads, 1).expand(-1, -1, width), rates[:, None, None].expand(-1, width, state)]
    given += [random(batch, groups, state), random(batch, groups, state), random(heads)[:, None].expand(-1, width)]
    return given, {"z": None, "dt_bias": random(heads)[:, None].expand(-1, width), "dt_softplus": True}


SCANS_OF = {
    **{shape: ("mamba2_chunk_scan", "mamba2", arguments, SHAPES[shape]) for shape in SHAPES},
    **{f"Mamba-1, {shape}": ("mamba_selective_scan", "mamba", channels, CHANNELS[shape]) for shape in CHANNELS},
}


def close(ours, theirs, share=1e-5):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=share * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SCANS_OF)
def test_outputs_states_and_gradients_are_those_of_transformers(case):
    name, family, make, shape = SCANS_OF[case]
    results = []
    for function in functions(name, family):
        given, named = make(shape)
        given[0] = given[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        output, state = function(*given, **named)
        output.view(*output.shape[:2], -1)  # as the mixer of falcon_h1 does
        leaves = [leaf for leaf in (*given, *named.values()) if isinstance(leaf, torch.Tensor)]
        assert all(leaf.requires_grad for leaf in leaves)
        with torch.inference_mode():
            alone, left = function(*given, **named)
        gradients = torch.autograd.grad(output.square().sum() + state.square().sum(), leaves)
        results.append((output, state, alone, left, *gradients))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_a_scan_is_as_precise_as_float32_allows():
    """The cumulative decay of a long chunk, as transformers takes it, is not."""
    given, named = arguments((1, 256, 6, 16, 2, 8))
    named |= {"chunk_size": 256, "dt_limit": (0.0, float("inf"))}
    x, dt, rates, b, c = (tensor.detach().double() for tensor in given)
    dt = torch.nn.functional.softplus(dt + named["dt_bias"])
    b, c = (tensor.repeat_interleave(3, 2) for tensor in (b, c))
    state, outputs = named["initial_states"].double(), []
    for token in range(256):
        state = state * (dt[:, token] * rates).exp()[..., None, None]
        state = state + (dt[:, token, :, None] * x[:, token])[..., None] * b[:, token, :, None]
        outputs.append((state * c[:, token, :, None]).sum(-1) + named["D"][:, None] * x[:, token])
    with torch.inference_mode():
        results = scan()[0](*given, **named)
    for found, exact in zip(results, (torch.stack(outputs, 1), state), strict=True):
        close(found.double(), exact, 2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("made", "shape"), [(arguments, "many chunks"), (channels, "a chunk and more")])
def test_a_scan_goes_on_with_the_state_that_it_left(made, shape):
    """Mamba-1's takes no state; its outputs are those of a scan over fewer tokens."""
    if made is arguments:
        given, named = arguments(SHAPES[shape])
        whole, last = scan()[0](*given, **named)
        first, state = scan()[0](*(tensor[:, :77] if tensor.dim() > 1 else tensor for tensor in given), **named)
        rest = [tensor[:, 77:] if tensor.dim() > 1 else tensor for tensor in given]
        second, end = scan()[0](*rest, **named | {"initial_states": state})
        close(torch.cat([first, second], 1), whole)
        close(end, last)
    else:
        given, named = channels(CHANNELS[shape])
        ours, _ = functions("mamba_selective_scan", "mamba")
        fewer = [given[0][..., :41], given[1][..., :41], given[2], given[3][..., :41], given[4][..., :41]]
        close(ours(*fewer, **named | {"z": named["z"][..., :41]})[0], ours(*given, **named)[0][..., :41])


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_is_computed_as_precisely_as_by_transformers():
    results = [
        function(*given, **named)[0]
        for function in scan()
        for given, named in [arguments(SHAPES["two groups"], torch.bfloat16)]
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5 * results[1].abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_mamba_1_in_bfloat16_is_computed_more_precisely_than_by_transformers():
    """transformers rounds each state to bfloat16 before it reads it."""
    ours, theirs = functions("mamba_selective_scan", "mamba")
    given, named = channels(CHANNELS["a chunk and more"], torch.bfloat16)
    steps = torch.nn.functional.softplus(given[1] + named["delta_bias"].bfloat16()[:, None])  # rounded by both
    single = [given[0].float(), steps.float(), given[2], given[3].float(), given[4].float()]
    exact, state = theirs(*single, **named | {"z": named["z"].float(), "delta_bias": None, "delta_softplus": False})
    (output, left), (other, _) = ours(*given, **named), theirs(*given, **named)
    assert output.dtype == other.dtype
    close(left, state)
    apart = [(found.float() - exact).norm() / exact.norm() for found in (output, other)]
    assert apart[0] <= apart[1] < 0.01


STEPS = {"two groups": (2, 8, 16, 2, 17), "one group": (3, 6, 16, 1, 16)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", STEPS)
def test_a_step_gives_the_output_and_the_state_of_transformers(shape):
    ours, theirs = functions("mamba2_selective_state_update")
    given, named = step(STEPS[shape])
    states = [given[0].clone(), given[0].clone()]
    with torch.inference_mode():
        outputs = [function(state, *given[1:], **named) for function, state in zip((ours, theirs), states, strict=True)]
    close(*outputs)
    close(*states)
    assert not states[0].equal(given[0])
    assert not torch.equal(*states)  # so it was not left to transformers
    given, named = step(STEPS[shape], torch.bfloat16)
    with torch.inference_mode():
        results = [function(given[0].clone(), *given[1:], **named) for function in (ours, theirs)]
    assert results[0].dtype == torch.bfloat16
    close(*(result.float() for result in results), 0.02)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_cannot_be_taken_in_place_is_that_of_transformers():
    ours, theirs = functions("mamba2_selective_state_update")
    given, named = step(STEPS["two groups"])
    state, inputs, dt, rates, *rest = given
    unequal = torch.rand(dt.shape)
    cases = [
        (state.transpose(2, 3).contiguous().transpose(2, 3), inputs, dt, rates),
        (state.double(), inputs, dt, rates),
        (state, inputs, unequal, rates),
        (state, inputs, dt, rates * torch.rand(rates.shape)),
    ]
    for case in cases:
        with torch.inference_mode():
            results = [function(case[0].clone(), *case[1:], *rest, **named) for function in (ours, theirs)]
        assert torch.equal(*results)
    with torch.enable_grad():
        assert ours(state, inputs, dt, rates, *rest, **named).requires_grad


@pytest.fixture
def stock(monkeypatch):
    """Lets a family run the functions of transformers."""

    def use(family):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in ("mamba2_chunk_scan", "mamba_selective_scan", "mamba2_selective_state_update"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)

    return use


def states(model, ids, steps):
    """Logits, and the states in the cache, after a prompt and each of some steps."""
    cache = DynamicCache(config=model.config)
    found = []
    for part in ids.split([ids.shape[1] - steps] + [1] * steps, 1):
        with torch.inference_mode():
            found.append(model(input_ids=part, **cache_argument(model, cache), use_cache=True).logits)
        for layer in cache.layers:
            for kind in ("conv_states", "recurrent_states"):
                found += [state.clone() for state in vars(layer).get(kind, {}).values() if state is not None]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_of_a_model_holds_the_states_that_transformers_leaves(name, stock):
    model = pico(name, **WIDE[name])
    ids = torch.cat([IDS] * 8, 1)
    ours = states(model, ids, 3)
    stock(name)
    theirs = states(model, ids, 3)
    assert len(ours) == len(theirs) > 8
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_padded_batch_are_those_of_single_rows(name):
    model = pico(name, **WIDE[name])
    rows = [torch.cat([IDS] * 8, 1)[:1], IDS[1:, :7]]
    longest = rows[0].shape[1]
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row[0], 1
    with torch.inference_mode():
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for number, row in enumerate(rows):
        close(padded[number, -row.shape[1] :], logits(model, row)[0], 1e-4)
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **wanted)[:, longest:]
    for number, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **wanted)[0, row.shape[1] :]
        assert alone.equal(together[number])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LONG)
def test_a_model_is_trained_by_the_gradients_of_transformers(name, stock):
    gradients = []
    for use in (lambda _: None, stock):
        use(name)
        model = pico(name, **LONG[name])
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", [16, 32, 33])
def test_gradients_with_short_chunks_are_left_to_transformers(chunk):
    given, named = arguments(SHAPES["many chunks"])
    results = [function(*given, **named | {"chunk_size": chunk})[0] for function in scan()]
    assert torch.equal(*results) == (chunk < 33)
    with torch.inference_mode():
        results = [function(*given, **named | {"chunk_size": chunk})[0] for function in scan()]
    assert not torch.equal(*results)


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_argument_goes_to_transformers():
    ours, _ = scan()
    given, named = arguments(SHAPES["one chunk"])
    with pytest.raises(ValueError, match="packed sequences"):
        ours(*given, **named, seq_idx=torch.zeros(2, 5, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore")
def test_arguments_that_are_off_are_no_obstacle():
    """granitemoehybrid passes ``output_router_logits`` on to its scan."""
    model = pico("granitemoehybrid")
    scans = []
    with watched_scan_inputs(lambda inputs: scans.append(inputs) or inputs.C), torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert len(scans) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_traced_or_compiled_scan_is_that_of_transformers():
    ours, theirs = scan()
    given, named = arguments(SHAPES["two groups"])
    tensors = [tensor.detach() for tensor in given]
    kept = {"chunk_size": 64, "D": named["D"].detach(), "dt_softplus": True}
    traced = torch.jit.trace(lambda *inputs: ours(*inputs, **kept), tensors)
    again = [tensor[:, :21] if tensor.dim() > 1 else tensor for tensor in tensors]
    assert torch.equal(traced(*tensors), theirs(*tensors, **kept))
    assert ours(*again, **kept).shape[1] == 21
