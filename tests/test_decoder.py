"""All layers in one native call: the same as layer by layer."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import pliant
from pico import DECODERS, IDS, logits, pico
from pliant.compat.cache_argument import cache_argument
from pliant.compat.native import Native, plan_of
from pliant.compat.native_check import run_natively
from pliant.runtime import library
from pliant.runtime.threads import threads

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.state())
NATIVE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def packed(name="llama", format="bf16", **settings):
    return pliant.apply(pico(name), pliant.PackedLinear(format=format, **settings), progress=False)


def layer_by_layer(model):
    """A copy that runs the code of transformers."""
    stock = copy.deepcopy(model)
    base = stock.base_model
    if isinstance(base, Native):
        base.__class__ = type(base).__mro__[2]
    return stock


@pytest.mark.parametrize("name", DECODERS)
def test_who_is_run_natively_computes_the_same(name):
    model = packed(name, head="bf16")
    assert isinstance(model.base_model, Native) == (name in NATIVE), model.pliant_history[-1]["why_not_native"]
    torch.testing.assert_close(logits(model), logits(layer_by_layer(model)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_cut_models_run_natively(name):
    model = pico(name)
    subnet = (
        pliant.Subnet()
        .without("layers.0.attention")
        .without("layers.2.mlp")
        .keeping("layers.1.mlp.channels", 9)
        .keeping("layers.1.attention.kv", 1)
    )
    pliant.apply(model, [pliant.Cut(subnet=subnet), pliant.PackedLinear(format="bf16")], progress=False)
    assert isinstance(model.base_model, Native)
    stock = layer_by_layer(model)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-3, atol=1e-4)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], **settings), stock.generate(IDS[:1], **settings))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_cached_is_uncached_to_the_bit_while_nothing_is_packed(format):
    model = packed(format=format)
    ids = torch.arange(3, 83)[None]
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, :50], **cache_argument(model, cache)).logits]
        steps += [model(ids[:, i : i + 1], **cache_argument(model, cache)).logits for i in range(50, 64)]
        assert torch.equal(torch.cat(steps, 1), whole[:, :64])
        steps += [model(ids[:, i : i + 1], **cache_argument(model, cache)).logits for i in range(64, 80)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_layers_that_see_a_few_tokens_back(name, settings):
    model = pliant.apply(pico(name, **settings), pliant.PackedLinear(format="bf16"), progress=False)
    assert isinstance(model.base_model, Native)
    ids = torch.arange(3, 83)[None]
    with torch.inference_mode():
        found = model(ids, use_cache=False).logits
        everything = packed(name)(ids, use_cache=False).logits
        assert torch.allclose(found[:, :6], everything[:, :6]) != torch.allclose(found, everything)
        torch.testing.assert_close(found, layer_by_layer(model)(ids, use_cache=False).logits, rtol=1e-3, atol=1e-4)
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, i : i + 1], **cache_argument(model, cache)).logits for i in range(60)]
    assert torch.equal(torch.cat(steps, 1), found[:, :60])


def test_what_it_does_not_do_is_left_to_transformers():
    model = packed()
    stock = layer_by_layer(model)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.inference_mode():
        for given in (
            {"attention_mask": mask},
            {"output_hidden_states": True},
            {"output_attentions": True},
            {"use_cache": True},  # two sequences in one cache
            {"return_dict": True},
        ):
            torch.testing.assert_close(
                model(IDS, **given).logits, stock(IDS, **given).logits, rtol=1e-3, atol=1e-4, msg=str(given)
            )
        static = StaticCache(config=model.config, max_cache_len=64)
        found = model(IDS[:1], **cache_argument(model, static)).logits
        torch.testing.assert_close(found, stock(IDS[:1]).logits, rtol=1e-3, atol=1e-4)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_embeddings_and_positions_may_be_given():
    model = packed()
    stock = layer_by_layer(model)
    places = torch.arange(5, 5 + IDS.shape[1])[None].expand(2, -1)
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(IDS)
        for given in ({"input_ids": IDS, "position_ids": places}, {"inputs_embeds": embeds}):
            found, expected = (one(**given, use_cache=False).logits for one in (model, stock))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_run_on_their_own():
    model = packed()
    expected = logits(model)
    again = copy.deepcopy(model)
    assert plan_of(again.base_model) is not plan_of(model.base_model)
    assert torch.equal(logits(again), expected)
    revived = pickle.loads(pickle.dumps(model))
    assert isinstance(revived.base_model, Native)
    assert torch.equal(logits(revived), expected)


def test_a_whole_model_compiles_as_one_graph():
    model = packed(format="int8")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    places = torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)
        static = StaticCache(config=model.config, max_cache_len=32)
        found = compiled(IDS[:1], **cache_argument(model, static), position_ids=places).logits
        torch.testing.assert_close(found, expected[:1], rtol=1e-3, atol=1e-4)


def test_a_model_that_computes_something_else_is_found_out():
    for name in ("granite", "gpt2"):
        why = packed(name).pliant_history[-1]["why_not_native"]
        assert why == f"{name} is not one of the families with a native run"
    model = pico()
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()  # its config says another
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    assert "its MLP has ReLU" in model.pliant_history[-1]["why_not_native"]
    part = packed(rules={"layers.1.self_attn.q_proj": "dense"})
    assert "not all of its linear layers are packed" in part.pliant_history[-1]["why_not_native"]
    again = packed()
    assert run_natively(again) == ""


def test_it_reloads_natively(tmp_path):
    model = packed(format="int8")
    model.save_pretrained(tmp_path)
    again = pliant.load(tmp_path)
    assert isinstance(again.base_model, Native)
    assert type(again.base_model).__name__ == "LlamaModel"
    assert torch.equal(logits(again), logits(model))


def generate(model, ids=IDS[:1], natively=True, **settings):
    """Threads of torch and of the kernels, in the head and in what transformers computes before it, while a model
    generates."""
    seen = {"head": set(), "layers": set()}
    own = model.base_model.rotary_emb if natively else model.base_model.layers[0]
    for name, module in (("head", model.lm_head), ("layers", own)):
        module.register_forward_pre_hook(lambda *_, own=seen[name]: own.add((torch.get_num_threads(), threads())))
    model.generate(ids, max_new_tokens=3, do_sample=False, **settings)
    assert torch.get_num_threads() == threads() == 2
    return seen


@pytest.mark.usefixtures("two_threads")
def test_generate_leaves_the_other_threads_to_the_kernels():
    one = {"head": {(1, 2)}, "layers": {(1, 2)}}
    assert generate(packed()) == one
    for again in (copy.deepcopy(packed()), pickle.loads(pickle.dumps(packed()))):
        assert generate(again) == one
    assert generate(packed(), stopping_criteria=[lambda ids, _: ids.sum(1) < 0]) == one
    # two sequences in one cache are left to transformers, and so are layers with hooks
    assert generate(packed(), IDS, natively=False) == {"head": {(1, 2)}, "layers": {(2, 2)}}
    assert generate(packed(), natively=False) == {"head": {(1, 2)}, "layers": {(2, 2)}}
    assert generate(packed(head="dense")) == {"head": {(2, 2)}, "layers": {(2, 2)}}


@pytest.mark.usefixtures("two_threads")
def test_generate_gives_threads_back_when_it_fails():
    model = packed()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(IDS[:1], max_new_tokens=0)
    assert torch.get_num_threads() == threads() == 2


def test_a_copy_generates_with_its_own_weights():
    model = packed()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], **settings), packed().generate(IDS[:1], **settings))
    assert not torch.equal(other.generate(IDS[:1], **settings), model.generate(IDS[:1], **settings))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.generate(IDS[:1], **settings), model.generate(IDS[:1], **settings))
