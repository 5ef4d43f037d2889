"""Keys and values in blocks: what is kept, what attention makes of it."""

from inspect import signature

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM

import pliant
from pico import IDS, config, pico
from pliant.errors import PackedError
from pliant.runtime import library
from pliant.runtime.cache import BLOCK, BlockCache, BlockLayer, Keeping, per_token

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.state())
HEADS, QUERIES, WIDTH = 2, 6, 24
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"  # since 5.24


def states(tokens, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, tokens, WIDTH, generator=generator) for _ in range(2))


def filled(tokens, chunks=(), **keeping):
    layer = BlockLayer(Keeping(**keeping))
    keys, values = states(tokens)
    at = 0
    for size in (*chunks, tokens - sum(chunks)):
        layer.append(keys[:, :, at : at + size], values[:, :, at : at + size])
        at += size
    return layer, keys, values


def attend(layer, q, window=0):
    """q of shape ``(tokens, queries, width)``."""
    out = torch.empty_like(q)
    library.library().pliant_cache_attend(
        layer.handle, q.data_ptr(), q.shape[0], q.shape[1], WIDTH**-0.5, window, out.data_ptr(), torch.get_num_threads()
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
    found = model.generate(IDS, max_new_tokens=80, min_new_tokens=80, do_sample=False, past_key_values=blocks)
    assert torch.equal(found, plain)
    assert blocks.get_seq_length() == found.shape[1] - 1
    assert blocks.bytes() > 0


def test_settings_that_make_no_sense_are_refused():
    for settings, said in (
        ({"format": "int4"}, "float32, bf16 or int8"),
        ({"key_sparsity": 1.0}, "from 0 to below 1"),
        ({"value_sparsity": -0.1}, "from 0 to below 1"),
        ({"format": "float32", "key_sparsity": 0.5}, "needs packed blocks"),
        ({"recent": -1}, "numbers of tokens"),
    ):
        with pytest.raises(PackedError, match=said):
            Keeping(**settings)
    layer = BlockLayer()
    with pytest.raises(PackedError, match="different shapes"):
        layer.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))


def test_a_native_decoder_fills_it():
    model = pliant.apply(pico("llama"), pliant.PackedLinear(format="int8"), progress=False)
    assert model.pliant_history[-1]["native"]
    ids = torch.arange(3, 203)[None]
    cache = BlockCache(model.config, format="int8", key_sparsity=0.3, value_sparsity=0.5, recent=64)
    with torch.inference_mode():
        model(ids, **{CACHE: cache})
        held = [tuple(states.clone() for states in layer.read()) for layer in cache.layers]
        step = model(ids[:, :1], **{CACHE: cache}).logits
        full = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
        # layer by layer, in transformers' own attention, over the very tokens that the blocks held
        plain = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(held):
            plain.update(keys, values, layer)
        with torch.enable_grad():  # which is never native
            expected = model(ids[:, :1], **{CACHE: plain}).logits
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
