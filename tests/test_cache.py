"""Keys and values in blocks: what is kept, what attention makes of it."""

import copy
import gc
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import pliant
from pico import IDS, config, pico
from pliant.compat.block_cache import BlockCache, BlockLayer
from pliant.compat.cache_argument import cache_argument
from pliant.errors import PackedError
from pliant.runtime import library
from pliant.runtime.kv_blocks import BLOCK, Keeping, per_token

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.state())
HEADS, QUERIES, WIDTH = 2, 6, 24


def states(tokens, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, tokens, WIDTH, generator=generator) for _ in range(2))


def filled(tokens, seed=0, chunks=(), **keeping):
    layer = BlockLayer(Keeping(**keeping))
    keys, values = states(tokens, seed)
    at = 0
    for size in (*chunks, tokens - sum(chunks)):
        layer.append(keys[:, :, at : at + size], values[:, :, at : at + size])
        at += size
    return layer, keys, values


def attend(layer, q, window=0):
    """q of shape ``(tokens, queries, width)``."""
    out = torch.empty_like(q)
    library.library().pliant_cache_attend(
        layer.blocks.handle,
        q.data_ptr(),
        q.shape[0],
        q.shape[1],
        q.shape[2] ** -0.5,
        window,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def expected(q, keys, values, window=0):
    """The same by torch, of the last tokens."""
    tokens, length = q.shape[0], keys.shape[2]
    place = torch.arange(length - tokens, length)[:, None]
    seen = torch.arange(length)[None] <= place
    if window:
        seen &= torch.arange(length)[None] > place - window
    shared = QUERIES // HEADS
    k, v = (s[0].repeat_interleave(shared, 0).double() for s in (keys, values))
    found = F.scaled_dot_product_attention(q.permute(1, 0, 2).double(), k, v, attn_mask=seen)
    return found.permute(1, 0, 2)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 128, 200, 300])
@pytest.mark.parametrize("window", [0, 40, 100])
def test_floats_are_attended_to_exactly(length, window):
    layer, keys, values = filled(length, format="float32")
    for tokens in {1, min(3, length), length}:
        q = torch.randn(tokens, QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
        found = attend(layer, q, window)
        torch.testing.assert_close(found.double(), expected(q, keys, values, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [1, 2, 100])
@pytest.mark.parametrize("window", [0, 300])
def test_packed_blocks_are_attended_to_as_what_they_hold(format, sparsity, tokens, window):
    layer, _, _ = filled(700, format=format, recent=32, key_sparsity=sparsity, value_sparsity=sparsity)
    keys, values = layer.read()
    q = torch.randn(tokens, QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
    tolerance = 1e-4 if format == "bf16" else 0.03
    found = attend(layer, q, window).double()
    torch.testing.assert_close(found, expected(q, keys, values, window), rtol=tolerance, atol=tolerance)


def test_a_token_is_the_same_whoever_asks_beside_it():
    layer, _, _ = filled(300, format="bf16", recent=32)
    q = torch.randn(1, QUERIES, WIDTH)
    alone = attend(layer, q)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(attend(layer, q), alone)
    finally:
        torch.set_num_threads(before)
    layer, _, _ = filled(300, format="float32")
    several = torch.cat([torch.randn(4, QUERIES, WIDTH), q])
    assert torch.equal(attend(layer, several)[-1:], attend(layer, q))


def test_growing_token_by_token_ends_where_growing_at_once_does():
    for keeping in ({"format": "float32"}, {"format": "bf16"}, {"format": "int8", "key_sparsity": 0.3}):
        at_once, _, _ = filled(200, **keeping)
        slowly, _, _ = filled(200, chunks=[1] * 199, **keeping)
        for a, b in zip(at_once.read(), slowly.read(), strict=True):
            assert torch.equal(a, b)


def test_what_is_kept():
    layer, keys, values = filled(300, format="bf16", recent=64)
    for found, given in zip(layer.read(), (keys, values), strict=True):
        packed = (300 - 64) // BLOCK * BLOCK
        assert torch.equal(found[:, :, :packed], given[:, :, :packed].bfloat16().float())
        assert torch.equal(found[:, :, packed:], given[:, :, packed:])
    layer, keys, values = filled(300, format="bf16", recent=0, key_sparsity=0.3, value_sparsity=0.5, first=4)
    for found, share in zip(layer.read(), (0.3, 0.5), strict=True):
        for block in range(300 // BLOCK):
            for head in range(HEADS):
                part = found[0, head, block * BLOCK : (block + 1) * BLOCK]
                whole = 4 if block == 0 else 0
                assert part[:whole].all()
                gone = int((part == 0).sum())
                assert gone == round(share * (BLOCK - whole) * WIDTH)
        assert found[:, :, 256:].all()
    small, large = (filled(640, format=f, recent=0)[0].bytes() for f in ("int8", "float32"))
    assert small < 0.4 * large


def test_cropping_and_batches():
    layer, _, _ = filled(300, format="bf16", recent=0)
    before = layer.read()
    layer.crop(-130)
    assert layer.get_seq_length() == 170
    for a, b in zip(layer.read(), before, strict=True):
        assert torch.equal(a, b[:, :, :170])
    more = states(30, seed=5)
    layer.append(*more)
    assert torch.equal(layer.read()[0][:, :, 170:192], more[0].bfloat16().float()[:, :, :22])
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.append(*states(100, batch=3))
    first = layer.read()[0]
    layer.reorder_cache(torch.tensor([2, 0]))
    assert torch.equal(layer.read()[0], first[[2, 0]])
    layer.batch_repeat_interleave(2)
    assert layer.read()[0].shape[0] == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_it_takes_the_place_of_any_cache(name):
    model = pico(name)
    plain = model.generate(IDS, max_new_tokens=80, min_new_tokens=80, do_sample=False)
    blocks = BlockCache(model.config, format="float32")
    found = model.generate(IDS, max_new_tokens=80, min_new_tokens=80, do_sample=False, **cache_argument(model, blocks))
    assert torch.equal(found, plain)
    assert blocks.get_seq_length() == found.shape[1] - 1
    assert blocks.bytes() > 0


def test_settings_that_make_no_sense_are_refused():
    for settings, said in (
        ({"format": "int4"}, "format must be one of float32, bf16, int8; not 'int4'"),
        ({"key_sparsity": 1.0}, "key_sparsity must be a number of at least 0 and below 1; not 1.0"),
        ({"value_sparsity": -0.1}, "value_sparsity must be a number of at least 0 and below 1; not -0.1"),
        ({"format": "float32", "key_sparsity": 0.5}, "needs packed blocks"),
        ({"recent": -1}, "recent must be a whole number of tokens, at least 0; not -1"),
        ({"recent": 1.5}, r"recent must be a whole number of tokens, at least 0; not 1\.5"),
        ({"first": "4"}, "first must be a whole number of tokens, at least 0; not '4'"),
        ({"key_sparsity": "0.3"}, "key_sparsity must be a number of at least 0 and below 1; not '0.3'"),
        ({"value_sparsity": None}, "value_sparsity must be a number"),
        ({"key_sparsity": False}, "key_sparsity must be a number"),
    ):
        with pytest.raises(PackedError, match=said):
            Keeping(**settings)
        with pytest.raises(PackedError, match=said):
            BlockCache(config("llama"), **settings)
    with pytest.raises(
        PackedError,
        match="unknown cache setting 'foo'; choose from: format, key_sparsity, value_sparsity, recent, first",
    ):
        BlockCache(config("llama"), foo=1)
    for wrong in (None, {}, "llama", pico()):
        with pytest.raises(PackedError, match="needs the config of a model"):
            BlockCache(wrong)
    layer = BlockLayer()
    with pytest.raises(PackedError, match="of equal shape"):
        layer.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))


def test_a_native_decoder_fills_it():
    model = pliant.apply(pico("llama"), pliant.PackedLinear(format="int8"), progress=False)
    assert model.pliant_history[-1]["native"]
    ids = torch.arange(3, 203)[None]
    cache = BlockCache(model.config, format="int8", key_sparsity=0.3, value_sparsity=0.5, recent=64)
    with torch.inference_mode():
        model(ids, **cache_argument(model, cache))
        held = [tuple(states.clone() for states in layer.read()) for layer in cache.layers]
        step = model(ids[:, :1], **cache_argument(model, cache)).logits
        full = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
        # layer by layer, in transformers' own attention, over the very tokens that the blocks held
        plain = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(held):
            plain.update(keys, values, layer)
        with torch.enable_grad():  # which is never native
            expected = model(ids[:, :1], **cache_argument(model, plain)).logits
    assert cache.get_seq_length() == plain.get_seq_length() == 201
    torch.testing.assert_close(step, expected.detach(), rtol=0.01, atol=0.01 * expected.abs().max().item())
    # what the blocks left out counts for more than what is rounded
    assert (step - full).norm() > 3 * (step - expected.detach()).norm()


def test_an_empty_cache_of_the_config_has_its_layers():
    cache = BlockCache(config("llama"))
    assert len(cache.layers) == 4
    assert cache.get_seq_length() == 0
    assert cache.bytes() == 0


@pytest.mark.parametrize(
    ("keeping", "bits"),
    [
        ({"format": "float32"}, 32),
        ({"format": "bf16"}, 16),
        ({"format": "int8"}, 8),
        ({"format": "bf16", "key_sparsity": 0.5, "value_sparsity": 0.5}, 9),
        ({"format": "int8", "key_sparsity": 0.25, "value_sparsity": 0.75}, 5),
    ],
)
def test_a_packed_token_takes_its_bits(keeping, bits):
    found = per_token(Keeping(**keeping), HEADS, 64)
    assert bits <= 8 * found / (2 * HEADS * 64) < bits + 1.5  # scales and headers
    assert (keeping["format"] == "float32") == (found == 2 * HEADS * 64 * 4)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda blocks: pickle.loads(pickle.dumps(blocks))])
@pytest.mark.parametrize("keeping", [{"format": "float32"}, {"format": "int8", "key_sparsity": 0.3, "recent": 0}])
def test_a_copy_is_a_cache_of_its_own(how, keeping):
    layer, _, _ = filled(300, **keeping)
    before = layer.read()
    twin = copy.copy(layer)
    twin.blocks = how(layer.blocks)
    q = torch.randn(2, QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attend(twin, q), attend(layer, q))
    twin.append(*states(30, seed=7))
    assert (twin.get_seq_length(), layer.get_seq_length()) == (330, 300)
    expected = attend(twin, q)
    del layer
    gc.collect()
    others = [filled(300, seed, **keeping) for seed in range(3)]  # where the freed memory was
    assert torch.equal(attend(twin, q), expected)
    for a, b in zip(twin.read(), before, strict=True):
        assert torch.equal(a[:, :, :256], b[:, :, :256])
    del others


def test_a_prompt_is_read_once_and_answered_twice():
    """The recipe of transformers' own documentation for a prompt that several questions share."""
    model = pliant.apply(pico("llama"), pliant.PackedLinear(format="bf16"), progress=False)
    prompt = torch.arange(3, 143)[None]
    cache = BlockCache(model.config)
    with torch.inference_mode():
        model(prompt, **cache_argument(model, cache))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for tail in ([5, 6, 7], [9, 10, 11, 12]):
        ids = torch.cat([prompt, torch.tensor([tail])], 1)
        again = model.generate(ids, **cache_argument(model, copy.deepcopy(cache)), **settings)
        assert torch.equal(again, model.generate(ids, **settings))
        assert cache.get_seq_length() == 140


@pytest.mark.parametrize("width", [1, 7, 8, 13, 24, 32, 40, 48, 64, 80, 96, 128, 250])
@pytest.mark.parametrize("isa", [isa for isa in library.available() if "emulated" not in isa])
def test_attention_does_not_depend_on_how_many_tokens_ask(isa, width):
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 70, width, generator=generator)
    q = torch.randn(70, 4, width, generator=generator)
    whole, slowly = BlockLayer(Keeping(format="float32")), BlockLayer(Keeping(format="float32"))
    whole.append(k, v)
    before = library.isa()
    library.choose(isa)
    try:
        together = attend(whole, q)
        for i in range(70):
            slowly.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            assert torch.equal(attend(slowly, q[i : i + 1].contiguous())[0], together[i])
    finally:
        library.choose(before)


HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "shared_expert_intermediate_size": 16},
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_that_keep_another_state_keep_it_as_ever(name):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
    ids = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 2, "num_key_value_heads": 4}
    own = AutoConfig.for_model(name, **shape, **ids, **HYBRIDS[name])
    model = AutoModelForCausalLM.from_config(own).eval()
    blocks = BlockCache(model.config, format="float32")
    assert [type(layer) is BlockLayer for layer in blocks.layers] == [False, True] * 2
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    found = model.generate(IDS, **cache_argument(model, blocks), **settings)
    assert torch.equal(found, model.generate(IDS, **settings))
    assert blocks.bytes() > 0


def test_a_model_without_keys_and_values_is_refused():
    with pytest.raises(PackedError, match="no cache layer of mamba holds only keys and values"):
        BlockCache(AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2))


def test_what_does_not_fit_is_refused():
    layer, _, _ = filled(10)
    with pytest.raises(PackedError, match="holds 1 sequence"):
        layer.append(*states(3, batch=2))
    with pytest.raises(PackedError, match="no tokens to read"):
        BlockLayer().read()


def test_cropping_by_what_stays_and_by_what_goes():
    layer, _, _ = filled(100)
    layer.crop(60)
    assert layer.get_seq_length() == 60
    layer.crop(-10)
    assert layer.get_seq_length() == 50
    layer.crop(0)
    assert layer.get_seq_length() == 50
