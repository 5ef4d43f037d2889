"""Importance of units against its definition: L1 norms element by element, Fisher information in one graph."""

import pytest
import torch
import torch.nn.functional as F

from pico import IDS, pico
from pliant.anatomy import anatomy_of
from pliant.criteria import l1_orders
from pliant.criteria.unit_fisher import loss_increases
from pliant.elastic import reorder
from pliant.progress import Progress

HEAD = 8


def absolute(row):
    return sum(abs(value) for value in row.tolist())


def by_hand_llama(layer):
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = (projection.weight for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    return _groups(q, k, v, groups=3), [
        absolute(mlp.gate_proj.weight[c]) + absolute(mlp.up_proj.weight[c]) for c in range(48)
    ]


def by_hand_phi3(layer):
    qkv, gate_up = layer.self_attn.qkv_proj.weight, layer.mlp.gate_up_proj.weight
    assert qkv.shape[0] == (6 + 3 + 3) * HEAD
    q, k, v = qkv[: 6 * HEAD], qkv[6 * HEAD : 9 * HEAD], qkv[9 * HEAD :]
    return _groups(q, k, v, groups=3), [absolute(gate_up[c]) + absolute(gate_up[48 + c]) for c in range(48)]


def by_hand_gpt2(layer):
    """Conv1D stores (in, out): a row of the definition is a column here."""
    qkv, up = layer.attn.c_attn.weight.T, layer.mlp.c_fc.weight.T
    return _groups(qkv[:32], qkv[32:64], qkv[64:], groups=4), [absolute(up[c]) for c in range(128)]


def _groups(q, k, v, groups):
    """Key and value rows count once for every query head that shares them."""
    shared = q.shape[0] // HEAD // groups
    scores = []
    for group in range(groups):
        score = 0.0
        for head in range(group * shared, (group + 1) * shared):
            score += sum(absolute(q[row]) for row in range(head * HEAD, (head + 1) * HEAD))
            score += sum(absolute(k[row]) for row in range(group * HEAD, (group + 1) * HEAD))
            score += sum(absolute(v[row]) for row in range(group * HEAD, (group + 1) * HEAD))
        scores.append(score)
    return scores


BY_HAND = {"llama": by_hand_llama, "phi3": by_hand_phi3, "gpt2": by_hand_gpt2}


@pytest.fixture(params=BY_HAND)
def name(request):
    return request.param


def scores_by_axis(name, model):
    anatomy = anatomy_of(model)
    layers = model.get_submodule(anatomy.architecture.layers)
    scores = {}
    for i, layer in enumerate(layers):
        heads, channels = BY_HAND[name](layer)
        scores[f"layers.{i}.attention.{'heads' if name == 'gpt2' else 'kv'}"] = heads
        scores[f"layers.{i}.mlp.channels"] = channels
    return scores


def test_orders_are_those_of_the_definition(name):
    model = pico(name)
    orders = l1_orders(model, anatomy_of(model))
    scores = scores_by_axis(name, model)
    assert orders.keys() == scores.keys()
    for axis, by_hand in scores.items():
        assert orders[axis].tolist() == sorted(range(len(by_hand)), key=lambda unit: -by_hand[unit]), axis


def test_an_order_is_a_permutation_of_all_units_and_not_the_trivial_one(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    orders = l1_orders(model, anatomy)
    for axis, order in orders.items():
        assert sorted(order.tolist()) == list(range(anatomy.axes[axis].size))
    assert any(order.tolist() != sorted(order.tolist()) for order in orders.values())


def test_after_reordering_the_norms_fall_and_the_order_is_the_trivial_one(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    before = scores_by_axis(name, model)
    reorder(model, anatomy, l1_orders(model, anatomy))
    for axis, scores in scores_by_axis(name, model).items():
        assert scores == sorted(scores, reverse=True), axis
        assert scores == pytest.approx(sorted(before[axis], reverse=True), rel=1e-12)
    for order in l1_orders(model, anatomy).values():
        assert order.tolist() == list(range(len(order)))


def test_key_and_value_rows_count_for_every_query_head_that_shares_them():
    """One group has the larger queries, the other the larger keys; only the sharing decides."""
    model = pico("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.zero_()
        attention.q_proj.weight[0, 0] = 3.0  # a query row of group 0
        attention.k_proj.weight[HEAD, 0] = 2.0  # a key row of group 1: shared by two heads, so 4
        attention.v_proj.weight[2 * HEAD, 0] = -1.0  # a value row of group 2: 2
    assert l1_orders(model, anatomy_of(model))["layers.0.attention.kv"].tolist() == [1, 0, 2]


def test_equal_units_keep_their_order(name):
    model = pico(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    for order in l1_orders(model, anatomy_of(model)).values():
        assert order.tolist() == list(range(len(order)))


def test_what_reads_the_units_and_biases_do_not_matter():
    model = pico("gpt2")
    anatomy = anatomy_of(model)
    before = l1_orders(model, anatomy)
    with torch.no_grad():
        for layer in model.transformer.h:
            for linear in (layer.attn.c_proj, layer.mlp.c_proj):
                linear.weight.copy_(torch.randn_like(linear.weight) * 100)
            for linear in (layer.attn.c_attn, layer.mlp.c_fc):
                linear.bias.copy_(torch.randn_like(linear.bias) * 100)
    for axis, order in l1_orders(model, anatomy).items():
        assert torch.equal(order, before[axis])


READERS = {  # what reads the channels, and what reads the heads
    "llama": ("mlp.down_proj", "self_attn.o_proj"),
    "gemma2": ("mlp.down_proj", "self_attn.o_proj"),
    "phi3": ("mlp.down_proj", "self_attn.o_proj"),
    "gpt2": ("mlp.c_proj", "attn.c_proj"),
    "opt": ("fc2", "self_attn.out_proj"),
    "gpt_neox": ("mlp.dense_4h_to_h", "attention.dense"),
    "falcon": ("mlp.dense_4h_to_h", "self_attention.dense"),
}


@pytest.mark.parametrize("name", READERS)
def test_fisher_is_what_factors_on_every_unit_and_token_say(name):
    """One graph of the whole model with a factor of 1 on every unit, against the layer by layer computation."""
    model = pico(name).eval()
    anatomy = anatomy_of(model)
    layers = model.get_submodule(anatomy.architecture.layers)
    factors, handles = {}, []
    for block, leader in [(one, leader) for one in anatomy.blocks.values() for leader in one.leaders]:
        factors[leader.name] = factor = torch.ones(*IDS.shape, leader.size, 1, requires_grad=True)
        path = READERS[name][block.kind == "attention"]

        def scaled(_module, args, factor=factor):
            return (args[0].view(*IDS.shape, factor.shape[2], -1).mul(factor).view(args[0].shape),)

        handles.append(layers[block.layer].get_submodule(path).register_forward_pre_hook(scaled))
    logits = model(input_ids=IDS, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    found = loss_increases(model, anatomy, IDS, Progress())
    assert found.keys() == factors.keys()
    for axis, factor in factors.items():
        slopes = factor.grad.double().flatten(2).flatten(0, 1)
        torch.testing.assert_close(found[axis], slopes.square().sum(0) / (2 * IDS.numel()), rtol=1e-4, atol=1e-12)


def test_fisher_leaves_no_gradients_behind():
    model = pico("llama")
    loss_increases(model, anatomy_of(model), IDS, Progress())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_unit_that_nothing_reads_has_no_fisher_information():
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[:, 7] = 0
    channels = loss_increases(model, anatomy_of(model), IDS, Progress())["layers.2.mlp.channels"]
    assert channels[7] == 0
    assert (channels > 0).sum() == len(channels) - 1


def test_long_windows_have_their_logits_made_in_parts(monkeypatch):
    model = pico("llama")
    whole = loss_increases(model, anatomy_of(model), IDS, Progress())
    monkeypatch.setattr("pliant.forward.windows.TOKENS_AT_ONCE", 4)
    for axis, found in loss_increases(model, anatomy_of(model), IDS, Progress()).items():
        torch.testing.assert_close(found, whole[axis], rtol=1e-4, atol=1e-12)
