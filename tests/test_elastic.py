"""Exactness over every architecture: the invariants that everything else stands on."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import pliant
from pico import ARCHITECTURES, DECODERS, ENCODERS, IDS, cases, fitted, head_of, inputs, leader, logits, pico, subnets
from pliant.anatomy import anatomy_of, layers_of
from pliant.architecture import Part, catalogue
from pliant.checkpoint.per_layer_config import write
from pliant.compat.cache_argument import cache_argument
from pliant.elastic import Elastic, Subnet, cache_bytes, check, extract, macs, parameters, reorder, validate
from pliant.errors import SubnetError

REMOVALS = {
    "first attention": lambda _: Subnet().without("layers.0.attention"),
    "first layer": lambda _: Subnet().without("layers.0.attention").without("layers.0.mlp"),
    "last layer": lambda _: Subnet().without("layers.3.attention").without("layers.3.mlp"),
    "an MLP": lambda _: Subnet().without("layers.2.mlp"),
    "channels": lambda _: Subnet().keeping("layers.1.mlp.channels", 17).keeping("layers.3.mlp.channels", 1),
    "heads": lambda head: Subnet().keeping(f"layers.2.attention.{head}", 1),
    "experts": lambda _: Subnet().keeping("layers.1.mlp.experts", 3).keeping("layers.3.mlp.experts", 2),
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
    "all but one attention": lambda _: Subnet(frozenset({"layers.0.attention"})),  # of each type: see chosen()
}


def all_but_one_attention(anatomy):
    """Keep the last attention of each type."""
    kept = {kind: layer for layer, kind in enumerate(anatomy.layer_types)}
    subnet = Subnet()
    for layer in range(anatomy.depth):
        if layer not in kept.values():
            subnet = subnet.without(f"layers.{layer}.attention")
    return subnet


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def close(a, b):
    """Equal but for the last bit: a view, a copy and a tensor from a file lie differently in memory."""
    return (a - b).abs().max() < 5e-6


def decoded(model, ids=IDS):
    """Logits of a prefill and of every decoding step after it, with the cache."""
    cache = cache_argument(model, DynamicCache(config=model.config))
    out = []
    with torch.inference_mode():
        step = model(input_ids=ids[:, :3], **cache, use_cache=True)
        out.append(step.logits[:, -1])
        for i in range(3, ids.shape[1]):
            out.append(model(input_ids=ids[:, i : i + 1], **cache, use_cache=True).logits[:, -1])
    return torch.stack(out, 1)


def chosen(name, kind, anatomy):
    if kind == "all but one attention":
        return all_but_one_attention(anatomy)
    return fitted(REMOVALS[kind](leader(name)), anatomy)


def reloaded(name, folder):
    """The model in a folder, every weight of it read from there."""
    model, told = head_of(name).from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def exact(name, model, subnet, folder):
    """Activated, extracted and reloaded, a sub-network computes the same; that is what is returned, reloaded."""
    anatomy = anatomy_of(model)
    dense = logits(model)
    with pliant.activate(model, subnet):
        activated = logits(model)
    assert torch.equal(logits(model), dense)
    assert not torch.allclose(activated, dense, atol=1e-3)

    left = extract(model, anatomy, subnet)
    assert close(logits(model), activated)
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet) == parameters(left)

    write(model)
    model.save_pretrained(folder)
    again = reloaded(name, folder)
    assert close(logits(again), activated)
    return again


@pytest.mark.parametrize(("name", "kind"), cases(REMOVALS))
def test_activated_equals_extracted_equals_reloaded(name, kind, tmp_path):
    model = pico(name)
    exact(name, model, chosen(name, kind, anatomy_of(model)), tmp_path / "cut")


_OLD_FALCON = {"new_decoder_architecture": False, "num_kv_heads": None}
VARIANTS = {
    "stablelm, parallel residuals": ("stablelm", {"use_parallel_residual": True}),
    "phi, queries and keys normalised": ("phi", {"qk_layernorm": True}),
    "falcon, one key for all": ("falcon", {**_OLD_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon, a key for each": ("falcon", {**_OLD_FALCON, "multi_query": False, "parallel_attn": False}),
    "falcon, one norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "falcon, position biases": ("falcon", {**_OLD_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "gpt_neox, residuals in turn": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, norms after the sum": ("opt", {"do_layer_norm_before": False}),
    "opt, narrow embeddings": ("opt", {"word_embed_proj_dim": 24}),
    "bloom, residual after the norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "vit, no biases": ("vit", {"qkv_bias": False}),
    "qwen3_moe, scores as they are": ("qwen3_moe", {"norm_topk_prob": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_layouts_that_a_config_of_a_family_can_ask_for_are_exact_too(variant, tmp_path):
    name, overrides = VARIANTS[variant]
    model = pico(name, **overrides)
    anatomy = anatomy_of(model)
    check(model, anatomy)
    subnet = fitted(REMOVALS["a mixture"](leader(name)), anatomy)
    again = exact(name, model, subnet, tmp_path / "cut")
    if name in DECODERS:
        assert torch.allclose(decoded(again), logits(again)[:, 2:], atol=2e-4)
        assert cached(again) == cache_bytes(anatomy, subnet, element=4)


@pytest.mark.parametrize(("name", "kind"), cases(REMOVALS, DECODERS))
def test_decoding_with_the_cache_equals_the_full_forward(name, kind, tmp_path):
    model = pico(name)
    anatomy = anatomy_of(model)
    subnet = chosen(name, kind, anatomy)
    with pliant.activate(model, subnet):
        expected = logits(model)[:, 2:]
        assert torch.allclose(decoded(model), expected, atol=2e-4)
    extract(model, anatomy, subnet)
    write(model)
    assert torch.allclose(decoded(model), expected, atol=2e-4)
    model.save_pretrained(tmp_path / "cut")
    model = reloaded(name, tmp_path / "cut")
    assert torch.allclose(decoded(model), expected, atol=2e-4)
    mask = torch.ones_like(IDS)
    by_cache = [
        model.generate(
            IDS, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **options
        )
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert by_cache[0].equal(by_cache[1])
    assert by_cache[0].equal(by_cache[2])


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_counts_equal_the_real_ones(name, data):
    model = pico(name, attn_implementation="eager")
    if "experts" in catalogue()[name].axes:
        model.set_experts_implementation("eager")  # the counter knows no grouped matrix products
    anatomy = anatomy_of(model)
    subnet = data.draw(subnets(anatomy))
    extract(model, anatomy, subnet)
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet)
    with FlopCounterMode(display=False) as counter:
        logits(model, IDS[:1])
    tokens = 17 if name == "vit" else IDS.shape[1]
    outside = _macs_outside(model, counter)
    assert name in ENCODERS or all("rotary" in path for path in outside)
    assert counter.get_total_flops() // 2 - sum(outside.values()) == macs(anatomy, subnet, tokens=tokens)
    if name in ENCODERS:
        assert cache_bytes(anatomy, subnet, element=4) == 0
        return
    assert cached(model) == cache_bytes(anatomy, subnet, element=4)


def cached(model):
    """Bytes that one token really adds to the cache."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=IDS[:1, :5], **cache_argument(model, cache), use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized) // 5


def _macs_outside(model, counter):
    """What was counted neither in the layers nor in the output head: rotary angles; patches and the head of
    encoders."""
    layers = layers_of(model, anatomy_of(model).architecture)
    inside = {*layers.modules(), model.get_output_embeddings()}
    leaves = {path: module for path, module in model.named_modules() if not any(module.children())}
    counted = counter.get_flop_counts()
    totals = {
        path: sum(counted.get(f"{type(model).__name__}.{path}", {}).values()) // 2
        for path, module in leaves.items()
        if module not in inside
    }
    return {path: total for path, total in totals.items() if total}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bloom"])
def test_gradients_flow_into_the_kept_part_of_the_full_tensors(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    subnet = fitted(Subnet().keeping("layers.1.mlp.channels", 5), anatomy)
    ((axis, kept),) = subnet.keep
    block = anatomy.blocks["layers.1.mlp"]
    (down,) = (w for w in block.weights if w.reads is not None and w.dims[w.reads] == (Part("channels"),))
    full = layers_of(model, anatomy.architecture)[1].get_parameter(down.path)
    with pliant.activate(model, subnet):
        model(**inputs(model)).logits.square().mean().backward()
    assert full.shape[down.reads] == anatomy.axes[axis].size > kept
    by_channel = full.grad.movedim(down.reads, 0)
    assert by_channel[:kept].abs().min() > 0
    assert not by_channel[kept:].any()


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
    layer = layers_of(model, anatomy_of(model).architecture)[1]

    def record(_module, args, kwargs, output):
        seen.update(a=args[0] if args else kwargs["hidden_states"])
        seen.update(b=output[0] if isinstance(output, tuple) else output)

    layer.register_forward_hook(record, with_kwargs=True)
    with pliant.activate(model, subnet):
        logits(model)
    assert torch.equal(seen["a"], seen["b"])


@pytest.mark.parametrize(("gone", "stays"), [("attention", "mlp"), ("mlp", "attention")])
def test_a_norm_that_two_blocks_share_stays_when_one_of_them_goes(gone, stays):
    model = pico("phi")
    anatomy = anatomy_of(model)
    layer = model.model.layers[1]
    dense = layer.input_layernorm
    seen = {}
    extract(model, anatomy, Subnet().without(f"layers.1.{gone}"))
    assert layer.input_layernorm is dense
    layer.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))
    layer.get_submodule(anatomy.blocks[f"layers.1.{stays}"].spec.module).register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(read=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs(model))
        assert torch.equal(seen["read"], dense(seen["stream"]))
    assert not torch.equal(seen["read"], seen["stream"])


@pytest.mark.parametrize(
    ("name", "overrides"), [("mixtral", {}), ("qwen3_moe", {}), ("qwen3_moe", {"norm_topk_prob": False})]
)
@pytest.mark.parametrize("kept", [2, 3])
def test_cutting_experts_equals_routing_among_those_that_stay(name, overrides, kept, monkeypatch):
    model = pico(name, **overrides)
    router = model.model.layers[1].mlp.gate.weight
    linear = torch.nn.functional.linear

    def masked(input, weight, bias=None):
        out = linear(input, weight, bias)
        if weight is router:
            out[:, kept:] = -torch.inf
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", masked)
    expected = logits(model)
    monkeypatch.undo()
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    extract(model, anatomy_of(model), Subnet().keeping("layers.1.mlp.experts", kept))
    assert close(logits(model), expected)


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
        (Subnet().keeping("layers.0.attention.heads", 2), "follows another axis; choose 'layers.0.attention.kv'"),
        (Subnet().keeping("layers.0.mlp.channels", 0), "1 to 48"),
        (Subnet().keeping("layers.0.mlp.channels", 49), "1 to 48"),
        (Subnet(frozenset({"layers.0.mlp"}), (("layers.0.mlp.channels", 3),)), "skipped"),
        (Subnet(frozenset(f"layers.{i}.attention" for i in range(4))), "at least one must stay"),
    ],
)
def test_an_impossible_subnet_is_refused(subnet, told):
    with pytest.raises(SubnetError, match=told):
        validate(subnet, anatomy_of(pico("llama")))


@pytest.mark.parametrize(
    ("name", "axis", "units", "told"),
    [
        ("mixtral", "mlp.experts", 1, "keep 2 to 4 units, not 1"),
        ("mixtral", "mlp.channels", 12, "in multiples of 8, not 12"),
        ("bloom", "mlp.channels", 8, "no axis"),
        ("bloom", "attention.heads", 2, "no axis"),
        ("falcon", "attention.heads", 2, "no axis"),
        ("olmo2", "attention.kv", 2, "no axis"),
    ],
)
def test_what_a_family_does_not_allow_is_refused(name, axis, units, told):
    with pytest.raises(SubnetError, match=told):
        validate(Subnet().keeping(f"layers.1.{axis}", units), anatomy_of(pico(name)))


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
    with pytest.raises(SubnetError, match="a sub-network must be"):
        Subnet.from_dict({"width": 3})
    for units in (0.5, True, "3", None):
        with pytest.raises(SubnetError, match="a keeps must be a whole number"):
            Subnet.from_dict({"keep": {"a": units}})
