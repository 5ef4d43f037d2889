"""Exactness over every architecture: the invariants that everything else stands on."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import pliant
from pico import ARCHITECTURES, leader, pico, subnets
from pliant.anatomy import anatomy_of
from pliant.checkpoint.schema import write
from pliant.elastic import Elastic, Subnet, cache_bytes, extract, macs, parameters, reorder, validate
from pliant.errors import SubnetError

IDS = torch.tensor([[5, 17, 101, 3, 77, 250, 9, 41, 12], [8, 8, 30, 299, 61, 4, 19, 23, 150]])

REMOVALS = {
    "first attention": lambda _: Subnet().without("layers.0.attention"),
    "first layer": lambda _: Subnet().without("layers.0.attention").without("layers.0.mlp"),
    "last layer": lambda _: Subnet().without("layers.3.attention").without("layers.3.mlp"),
    "an MLP": lambda _: Subnet().without("layers.2.mlp"),
    "channels": lambda _: Subnet().keeping("layers.1.mlp.channels", 17).keeping("layers.3.mlp.channels", 1),
    "heads": lambda head: Subnet().keeping(f"layers.2.attention.{head}", 1),
    "heads of the layer that takes over the first slot": lambda head: (
        Subnet()
        .without("layers.0.attention")
        .keeping(f"layers.1.attention.{head}", 2)
        .keeping(f"layers.2.attention.{head}", 1)
    ),
    "a mixture": lambda head: (
        Subnet()
        .without("layers.0.attention")
        .without("layers.2.mlp")
        .keeping("layers.1.mlp.channels", 20)
        .keeping(f"layers.3.attention.{head}", 2)
    ),
}


def all_but_one_attention(model):
    """Keep the last attention of each type."""
    anatomy = anatomy_of(model)
    kept = {kind: layer for layer, kind in enumerate(anatomy.layer_types)}
    subnet = Subnet()
    for layer in range(anatomy.depth):
        if layer not in kept.values():
            subnet = subnet.without(f"layers.{layer}.attention")
    return subnet


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def close(a, b):
    """Equal but for the last bit: a view, a copy and a tensor from a file lie differently in memory."""
    return (a - b).abs().max() < 5e-6


def decoded(model, ids=IDS):
    """Logits of a prefill and of every decoding step after it, with the cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    out = []
    with torch.inference_mode():
        step = model(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
        out.append(step.logits[:, -1])
        for i in range(3, ids.shape[1]):
            out.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(out, 1)


def chosen(name, kind, model):
    return all_but_one_attention(model) if kind == "all but one attention" else REMOVALS[kind](leader(name))


@pytest.mark.parametrize("kind", [*REMOVALS, "all but one attention"])
def test_activated_equals_extracted_equals_reloaded(name, kind, tmp_path):
    model = pico(name)
    anatomy = anatomy_of(model)
    subnet = chosen(name, kind, model)
    dense = logits(model)
    with pliant.activate(model, subnet):
        activated = logits(model)
    assert torch.equal(logits(model), dense)
    assert not torch.allclose(activated, dense, atol=1e-3)

    left = extract(model, anatomy, subnet)
    assert close(logits(model), activated)
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet) == parameters(left)

    write(model)
    model.save_pretrained(tmp_path / "cut")
    reloaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert close(logits(reloaded.eval()), activated)


@pytest.mark.parametrize("kind", [*REMOVALS, "all but one attention"])
def test_decoding_with_the_cache_equals_the_full_forward(name, kind, tmp_path):
    model = pico(name)
    subnet = chosen(name, kind, model)
    with pliant.activate(model, subnet):
        expected = logits(model)[:, 2:]
        assert torch.allclose(decoded(model), expected, atol=2e-4)
    extract(model, anatomy_of(model), subnet)
    write(model)
    assert torch.allclose(decoded(model), expected, atol=2e-4)
    model.save_pretrained(tmp_path / "cut")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert torch.allclose(decoded(reloaded), expected, atol=2e-4)
    mask = torch.ones_like(IDS)
    by_cache = [
        reloaded.generate(
            IDS, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options
        )
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert by_cache[0].equal(by_cache[1])
    assert by_cache[0].equal(by_cache[2])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_reordering_units_keeps_the_logits(name, seed):
    model = pico(name)
    anatomy = anatomy_of(model)
    dense = logits(model)
    generator = torch.Generator().manual_seed(seed)
    orders = {axis.name: torch.randperm(axis.size, generator=generator) for axis in anatomy.axes.values()}
    reorder(model, anatomy, orders)
    assert torch.allclose(logits(model), dense, atol=2e-4)
    reorder(model, anatomy, {axis: torch.argsort(order) for axis, order in orders.items()})
    assert torch.equal(logits(model), dense)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_walk_through_subnets_computes_the_same_as_going_there_at_once(name, data):
    model = pico(name)
    elastic = Elastic(model)
    anatomy = elastic.anatomy
    for _ in range(3):
        subnet = data.draw(subnets(anatomy))
        elastic.activate(subnet)
        with pliant.activate(pico(name), subnet) as fresh:
            assert torch.equal(logits(model), logits(fresh))
    elastic.activate(Subnet())
    assert torch.equal(logits(model), logits(pico(name)))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_counts_equal_the_real_ones(name, data):
    model = pico(name, attn_implementation="eager")
    anatomy = anatomy_of(model)
    subnet = data.draw(subnets(anatomy))
    extract(model, anatomy, subnet)
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet)
    with FlopCounterMode(display=False) as counter:
        logits(model, IDS[:1])
    rotary = counter.get_flop_counts().get("Global", {})
    assert counter.get_total_flops() // 2 - _rotary_macs(model, IDS.shape[1]) == macs(
        anatomy, subnet, tokens=IDS.shape[1]
    ), rotary
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=IDS[:1, :5], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized)
    assert held * 4 == 5 * cache_bytes(anatomy, subnet, element=4)


def _rotary_macs(model, tokens):
    """Some families compute their rotary angles by a matrix product of positions and frequencies."""
    with FlopCounterMode(display=False) as counter:
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module(torch.zeros(1, tokens, 1), position_ids=torch.arange(tokens)[None])
    return counter.get_total_flops() // 2


def test_gradients_flow_into_the_kept_part_of_the_full_tensors(name):
    model = pico(name)
    layer = model.get_submodule(anatomy_of(model).architecture.layers)[1]
    down = layer.mlp.c_proj.weight if name == "gpt2" else layer.mlp.down_proj.weight
    with pliant.activate(model, Subnet().keeping("layers.1.mlp.channels", 5)):
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    by_channel = down.grad if name == "gpt2" else down.grad.T
    assert by_channel[:5].abs().min() > 0
    assert not by_channel[5:].any()


def test_views_share_memory_with_the_full_tensors():
    model = pico("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    with pliant.activate(model, Subnet().keeping("layers.1.mlp.channels", 5)):
        view = model.model.layers[1].mlp.down_proj.weight
        assert view.shape == (36, 5)
        assert view.data_ptr() == weight.data_ptr()
    assert model.model.layers[1].mlp.down_proj.weight is weight


def test_a_skipped_layer_passes_its_input_on_unchanged(name):
    model = pico(name)
    subnet = Subnet().without("layers.1.attention").without("layers.1.mlp")
    seen = {}
    layer = model.get_submodule(anatomy_of(model).architecture.layers)[1]

    def record(_module, args, kwargs, output):
        seen.update(a=args[0] if args else kwargs["hidden_states"], b=output)

    layer.register_forward_hook(record, with_kwargs=True)
    with pliant.activate(model, subnet):
        logits(model)
    assert torch.equal(seen["a"], seen["b"])


def test_extracting_twice_equals_extracting_once():
    once, twice = pico("llama"), pico("llama")
    first = Subnet().without("layers.0.mlp").keeping("layers.1.mlp.channels", 30)
    both = first.without("layers.2.attention").keeping("layers.1.mlp.channels", 10)
    extract(once, anatomy_of(once), both)
    left = extract(twice, anatomy_of(twice), first)
    extract(twice, left, Subnet().without("layers.2.attention").keeping("layers.1.mlp.channels", 10))
    assert torch.equal(logits(once), logits(twice))


def test_linear_layers_say_their_real_size_after_cutting():
    model = pico("llama")
    extract(model, anatomy_of(model), Subnet().keeping("layers.1.mlp.channels", 10))
    assert model.model.layers[1].mlp.down_proj.in_features == 10
    assert model.model.layers[1].mlp.up_proj.out_features == 10


@pytest.mark.parametrize(
    ("subnet", "told"),
    [
        (Subnet().without("layers.9.mlp"), "no block 'layers.9.mlp'"),
        (Subnet().keeping("layers.0.mlp.width", 3), "no axis 'layers.0.mlp.width'"),
        (Subnet().keeping("layers.0.mlp.channels", 0), "1 to 48"),
        (Subnet().keeping("layers.0.mlp.channels", 49), "1 to 48"),
        (Subnet(frozenset({"layers.0.mlp"}), (("layers.0.mlp.channels", 3),)), "skipped"),
        (Subnet(frozenset(f"layers.{i}.attention" for i in range(4))), "at least one must stay"),
    ],
)
def test_an_impossible_subnet_is_refused(subnet, told):
    with pytest.raises(SubnetError, match=told):
        validate(subnet, anatomy_of(pico("llama")))


def test_the_last_attention_of_a_type_cannot_go():
    with pytest.raises(SubnetError, match="sliding_attention"):
        validate(Subnet().without("layers.0.attention").without("layers.2.attention"), anatomy_of(pico("gemma2")))


@given(
    skip=st.frozensets(st.sampled_from(["layers.0.mlp", "layers.1.mlp", "layers.2.attention"])),
    keep=st.dictionaries(st.sampled_from(["layers.3.mlp.channels", "layers.3.attention.kv"]), st.integers(1, 9)),
)
def test_a_subnet_survives_json_and_hashes_by_value(skip, keep):
    import json

    subnet = Subnet(skip, tuple(sorted(keep.items())))
    again = Subnet.from_dict(json.loads(str(subnet)))
    assert again == subnet
    assert hash(again) == hash(subnet)


def test_what_is_not_a_subnet_is_refused():
    with pytest.raises(SubnetError, match="a sub-network is"):
        Subnet.from_dict({"width": 3})
