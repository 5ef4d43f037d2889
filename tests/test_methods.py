"""Baselines and other searches, all through one interface."""

import math
import sys

import pytest
import torch

import pliant
from pico import DECODERS, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.criteria import by_falling
from pliant.criteria.activation import activation_sizes
from pliant.criteria.block_ranking import RANKINGS, influence, relative_magnitude
from pliant.criteria.unit_fisher import loss_increases
from pliant.criteria.unit_readers import measured_axes
from pliant.elastic import Subnet, extract, parameters, ratio
from pliant.errors import MissingExtraError, RatioError, StepError, SubnetError, WeightError
from pliant.measure.prefix_scorer import PrefixScorer
from pliant.progress import Progress
from pliant.prune.moves import block_moves, layer_moves, pooled, width_moves
from pliant.registry import SEARCHES

WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "looked", "at", "dogs", "that", "ran", "over", "hills"]
TEXT = pliant.text([" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) for i in range(1, 60)])
SHARED = {"ratio": 0.15, "samples": 4, "seqlen": 64}
WINDOWS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(0))

STEPS = {
    **{f"oneshot by {by}": pliant.OneShot(**SHARED, by=by) for by in (*RANKINGS, "perplexity", "random")},
    "shortgpt": pliant.OneShot(**SHARED, by="influence", granularity="layer"),
    "unified": pliant.UnifiedPruner(**SHARED, mlp_group=8),
    "unified per byte": pliant.UnifiedPruner(**SHARED, mlp_group=8, per="bytes"),
    "knapsack": pliant.KnapsackPruner(**SHARED, levels=2, swaps=4, group=8),
    "fisher": pliant.FisherPruner(**SHARED, group=8),
    "fisher per byte": pliant.FisherPruner(**SHARED, group=8, per="bytes"),
    "multipruner, activation order": pliant.MultiPruner(**SHARED, width_samples=4, mlp_group=8, order="activation"),
    "multipruner, fisher order": pliant.MultiPruner(**SHARED, width_samples=4, mlp_group=8, order="fisher"),
    **{
        f"multipruner_evol by {search}": pliant.MultiPrunerEvol(
            **SHARED, width_samples=4, mlp_group=8, width_search=search, population=6, generations=4, tolerance=0.05
        )
        for search in SEARCHES
    },
}


def pruned(step, name="llama", **options):
    return pliant.apply(pico(name), step, TEXT, tokenizer=tokenizer(), progress=False, **options)


@pytest.mark.parametrize("name", STEPS)
def test_every_method_meets_the_ratio_and_leaves_a_model_that_runs(name, tmp_path):
    dense = pico("llama")
    model = pruned(STEPS[name])
    removed = 1 - sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    record = model.pliant_history[0]
    assert removed == pytest.approx(record["ratio"])
    assert removed >= 0.15
    model.save_pretrained(tmp_path / "cut")
    again = pliant.load(tmp_path / "cut")
    ids = WINDOWS[:1]
    with torch.inference_mode():
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=5e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "mixtral"])
@pytest.mark.parametrize("by", RANKINGS)
def test_rankings_work_on_every_layout(family, by):
    model = pico(family)
    anatomy = anatomy_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks = RANKINGS[by](model, anatomy, WINDOWS)
    assert set(ranks) == set(anatomy.blocks)
    assert all(math.isfinite(rank) for rank in ranks.values())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_influence_and_magnitude_are_what_their_formulas_say():
    model = pico("llama")
    anatomy = anatomy_of(model)
    seen = {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.self_attn.register_forward_hook(lambda _, __, out: seen.update(attention=out[0]))
    layer.mlp.register_forward_hook(lambda _, __, out: seen.update(mlp=out))
    with torch.inference_mode():
        model(WINDOWS)
    x = seen["x"]
    middle, end = x + seen["attention"], x + seen["attention"] + seen["mlp"]
    found = influence(pico("llama"), anatomy, WINDOWS)
    assert found["layers.1.attention"] == pytest.approx(
        1 - torch.cosine_similarity(x, middle, dim=-1).mean().item(), abs=1e-5
    )
    assert found["layers.1.mlp"] == pytest.approx(
        1 - torch.cosine_similarity(middle, end, dim=-1).mean().item(), abs=1e-5
    )
    found = relative_magnitude(pico("llama"), anatomy, WINDOWS)
    expected = (seen["mlp"].norm(dim=-1) / end.norm(dim=-1)).mean().item()
    assert found["layers.1.mlp"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "step",
    [
        *(pliant.OneShot(**SHARED, by=by) for by in ("influence", "perplexity")),
        pliant.KnapsackPruner(**SHARED, levels=2, group=8),
        pliant.FisherPruner(**SHARED, group=8),
    ],
    ids=lambda step: getattr(step, "by", step.kind),
)
def test_weights_that_are_finite_but_give_no_finite_loss_leave_the_model_as_it_was(step):
    model = pico("llama")
    with torch.no_grad():
        for matrix in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            matrix.weight.mul_(1e30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightError, match="loss"):
        pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "step",
    [
        pliant.OneShot(ratio=0.05, samples=4, seqlen=64, by="perplexity"),
        pliant.KnapsackPruner(ratio=0.05, samples=4, seqlen=64, levels=2, group=8),
        pliant.KnapsackPruner(ratio=0.05, samples=4, seqlen=64, levels=0, group=8),
    ],
    ids=["oneshot", "knapsack", "knapsack of whole blocks"],
)
def test_a_model_of_one_layer_can_lose_its_mlp(step):
    model = pico("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    record = pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False).pliant_history[0]
    assert record["ratio"] >= 0.05


def test_a_failure_after_the_cut_is_told_as_it_is(monkeypatch):
    def broken(*_):
        raise SubnetError("does not compute the same")

    monkeypatch.setattr("pliant.prune.session.extract_and_verify", lambda *given: (extract(*given), broken()))
    with pytest.raises(SubnetError, match="does not compute the same"):
        pruned(STEPS["fisher"])


def test_ranking_by_perplexity_is_the_first_step_of_the_search(tmp_path):
    ranks = pruned(STEPS["oneshot by perplexity"], work=tmp_path).pliant_history[0]["ranks"]
    searched = pruned(pliant.BlockPruner(**SHARED)).pliant_history[0]
    lowest = min(ranks, key=lambda name: ranks[name])
    assert searched["points"][0]["unit"] == lowest
    again = pruned(STEPS["oneshot by perplexity"], work=tmp_path).pliant_history[0]
    assert again["ranks"] == ranks
    assert again["counters"]["ranking by perplexity"]["evaluations"] == 0


def test_random_differs_by_seed_and_repeats_by_seed():
    chosen = [pruned(pliant.OneShot(**SHARED, by="random", seed=seed)).pliant_history[0]["ranks"] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_shortgpt_takes_whole_layers():
    skip = pruned(STEPS["shortgpt"]).pliant_history[0]["subnet"]["skip"]
    layers = {name.rpartition(".")[0] for name in skip}
    assert set(skip) == {f"{layer}.{kind}" for layer in layers for kind in ("attention", "mlp")}


def test_layers_are_never_offered_with_the_last_attention_of_a_type():
    anatomy = anatomy_of(pico("gemma2"))
    subnet = Subnet()
    while offered := layer_moves(anatomy)(subnet):
        subnet = offered[0].subnet
    assert len(subnet.skip) == 4  # two layers of four: one of each attention type stays


def test_pooled_moves_are_all_moves():
    anatomy = anatomy_of(pico("mixtral"))
    several = [block_moves(anatomy), width_moves(anatomy, {"channels": 8, "experts": 1})]
    units = [move.unit for move in pooled(*several)(Subnet())]
    assert units == [move.unit for moves in several for move in moves(Subnet())]
    assert "layers.0.mlp.experts" in units


# --- orders
# -----------------------------------------------------------------------------------------------------------------


def test_the_activation_order_puts_silent_channels_last():
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
        model.model.layers[1].mlp.up_proj.weight[11] = 0
    order = by_falling(activation_sizes(model, anatomy_of(model), WINDOWS), anatomy_of(model))[
        "layers.1.mlp.channels"
    ].tolist()
    assert sorted(order) == list(range(48))
    assert set(order[-2:]) == {7, 11}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gpt_neox", "mixtral"])
def test_the_activation_order_covers_what_matrices_read(family):
    model = pico(family)
    anatomy = anatomy_of(model)
    orders = by_falling(activation_sizes(model, anatomy, WINDOWS), anatomy)
    assert set(orders) == {name for name in anatomy.axes if not name.endswith(("experts", "mlp.channels"))} | (
        set() if family == "mixtral" else {name for name in anatomy.axes if name.endswith("mlp.channels")}
    )


def test_an_order_says_which_units_it_does_not_measure(capsys):
    step = pliant.UnifiedPruner(**SHARED, order="activation")
    for family in ("llama", "mixtral"):
        pliant.apply(pico(family), step, TEXT, tokenizer=tokenizer())
        lines = [line for line in capsys.readouterr().err.splitlines() if "measures no units" in line]
        assert [line.strip() for line in lines] == (
            ["activation measures no units of channels, experts: they are sorted by l1"] if family == "mixtral" else []
        )


# --- knapsack
# ----------------------------------------------------------------------------------------------------------


def test_swaps_never_make_it_worse():
    without, with_ = (
        pruned(pliant.KnapsackPruner(**SHARED, levels=2, swaps=swaps, group=8)).pliant_history[0]["points"][-1]["loss"]
        for swaps in (0, 12)
    )
    assert with_ <= without


def test_knapsack_leaves_multiples_of_a_group():
    for family in ("llama", "mixtral"):
        model = pruned(pliant.KnapsackPruner(**{**SHARED, "ratio": 0.4}, levels=4, swaps=0, group=16), family)
        keep = model.pliant_history[0]["subnet"]["keep"]
        channels = [units for name, units in keep.items() if name.endswith("channels")]
        assert channels
        assert all(units % 16 == 0 for units in channels)
    experts = [units for name, units in keep.items() if name.endswith("experts")]
    assert experts
    assert any(units % 16 for units in experts)  # they go one by one


# --- one look at the gradient
# -------------------------------------------------------------------------------------------


def test_what_the_loss_does_not_depend_on_goes_first():
    """Channels that nothing reads, scattered over two layers: taking out just those changes nothing."""
    model = pico("llama")
    silent = {0: [1, 5, 6, 11, 20, 30, 41, 47], 2: [0, 2, 3, 9, 10, 17, 33, 40, 41, 42, 43, 44, 45, 46, 25, 26]}
    with torch.no_grad():
        for layer, channels in silent.items():
            model.model.layers[layer].mlp.down_proj.weight[:, channels] = 0
        before = model(WINDOWS).logits
    whole = sum(parameter.numel() for parameter in model.parameters())
    step = pliant.FisherPruner(ratio=24 * 3 * 36 / whole, samples=4, seqlen=64, group=8)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    keep = {"layers.0.mlp.channels": 40, "layers.2.mlp.channels": 32}
    assert model.pliant_history[0]["subnet"] == {"skip": [], "keep": keep}
    with torch.no_grad():
        torch.testing.assert_close(model(WINDOWS).logits, before, atol=1e-5, rtol=1e-5)


def test_heads_that_nothing_reads_go_first():
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:32] = 0  # the queries of the second group
    whole = sum(parameter.numel() for parameter in model.parameters())
    step = pliant.FisherPruner(
        ratio=6 * 8 * 36 / whole, samples=4, seqlen=64, group=8
    )  # one group: 2 q, k, v, 2 columns of o
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    assert model.pliant_history[0]["subnet"]["keep"] == {"layers.1.attention.kv": 2}


@pytest.mark.parametrize("family", DECODERS)
def test_fisher_pruning_works_on_every_layout_that_has_axes(family):
    model = pico(family)
    axes = {axis.name for axis in measured_axes(anatomy_of(model))}
    damage = loss_increases(model, anatomy_of(model), WINDOWS, Progress())
    assert damage.keys() == axes
    assert all(torch.isfinite(found).all() and (found > 0).any() for found in damage.values())
    step = pliant.FisherPruner(ratio=0.05, samples=4, seqlen=64, group=4)
    if not axes:  # bloom: depth only
        with pytest.raises(RatioError, match="every axis to its smallest width removes nothing"):
            pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
        return
    record = pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False).pliant_history[0]
    assert record["ratio"] >= 0.05
    assert set(record["subnet"]["keep"]) <= axes


def test_a_ratio_that_widths_cannot_reach_is_refused_before_the_gradient(monkeypatch):
    monkeypatch.setattr("pliant.prune.fisher.loss_increases", lambda *_: pytest.fail("too late"))
    with pytest.raises(
        RatioError, match=r"narrowing every axis to its smallest width removes 0\.\d{4}; give at most that"
    ):
        pruned(pliant.FisherPruner(ratio=0.95, samples=4, seqlen=64))


def test_a_ratio_that_no_menu_reaches_is_refused_before_anything_is_scored(monkeypatch):
    monkeypatch.setattr(PrefixScorer, "score", lambda *_: pytest.fail("too late"))
    with pytest.raises(RatioError, match=r"the smallest choice of every block removes 0\.\d{4}; give"):
        pruned(pliant.KnapsackPruner(ratio=0.95, samples=4, seqlen=64))


# --- the evolutionary variant
# --------------------------------------------------------------------------------------------


def test_evolution_meets_the_ratio_and_repeats():
    pytest.importorskip("pymoo")
    step = pliant.MultiPrunerEvol(**SHARED, width_samples=4, mlp_group=8, population=6, generations=2, tolerance=0.05)
    first, again = (pruned(step).pliant_history[0] for _ in range(2))
    assert 0.15 <= first["ratio"] <= 0.20
    assert first["subnet"] == again["subnet"]


def test_evolution_is_refused_before_anything_is_scored_where_it_cannot_be_done(monkeypatch):
    monkeypatch.setattr(PrefixScorer, "score", lambda *_: pytest.fail("too late"))
    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(MissingExtraError, match="pymoo"):
        pruned(pliant.MultiPrunerEvol(**SHARED, width_samples=4))


def test_evolution_leaves_blocks_alone_that_are_too_much():
    pytest.importorskip("pymoo")
    step = pliant.MultiPrunerEvol(**SHARED | {"ratio": 0.02}, width_samples=4, mlp_group=8)
    record = pruned(step).pliant_history[0]
    assert not record["subnet"]["skip"]
    assert 0.02 <= record["ratio"] < 0.04


# --- bad settings
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: pliant.OneShot(ratio=0.1, by="taste"), "by must be one of influence, .*, random; not 'taste'"),
        (
            lambda: pliant.OneShot(ratio=0.1, granularity="model"),
            "granularity must be one of block, layer; not 'model'",
        ),
        (lambda: pliant.UnifiedPruner(ratio=0.1, per="euro"), "per must be one of unit, parameters, .*; not 'euro'"),
        (
            lambda: pliant.UnifiedPruner(ratio=0.1, order="random"),
            "unknown order 'random'; choose from: l1, activation, fisher, stored, or name your own",
        ),
        (
            lambda: pliant.UnifiedPruner(ratio=0.1, search="racing"),
            "search must be one of lazy, exact, naive; not 'racing'",
        ),
        (lambda: pliant.FisherPruner(ratio=0.1, per="unit"), "per must be one of parameters, .*; not 'unit'"),
        (lambda: pliant.FisherPruner(ratio=0.1, metric="kl"), "has no gradient"),
        (
            lambda: pliant.OneShot(ratio=0.1, metric="kl"),
            "metric 'kl' needs by='perplexity': ranking by influence evaluates no score",
        ),
        (lambda: pliant.FisherPruner(ratio=0.1, group=0), "group must be a whole number of at least 1"),
        (lambda: pliant.KnapsackPruner(ratio=0.1, swaps=-1), "swaps must be a whole number of at least 0"),
        (lambda: pliant.MultiPrunerEvol(ratio=0.1, population=1), "population must be a whole number of at least 4"),
        (lambda: pliant.BlockPruner(ratio=0.1, repair=-1), "repair must be a whole number of at least 0"),
        (lambda: pliant.BlockPruner(ratio=0.1, ridge=0), "ridge must be a number above 0; not 0"),
    ],
)
def test_a_faulty_setting_is_refused(make, told):
    with pytest.raises(StepError, match=told):
        make()


def test_a_ratio_out_of_reach_is_refused_before_any_work():
    with pytest.raises(RatioError, match="cannot be reached"):
        pruned(pliant.OneShot(ratio=0.9, samples=4, seqlen=64))


def test_ratios_of_methods_agree_with_the_anatomy():
    model = pico("llama")
    anatomy = anatomy_of(model)
    record = pruned(STEPS["knapsack"]).pliant_history[0]
    subnet = Subnet.from_dict(record["subnet"])
    assert record["ratio"] == pytest.approx(ratio(anatomy, subnet))
    assert record["parameters_after"] == parameters(anatomy, subnet)


@pytest.mark.parametrize("family", ["falcon", "olmo2", "bloom"])
def test_stages_that_a_layout_forbids_leave_their_share_to_the_others(family):
    step = pliant.MultiPruner(ratio=0.2, samples=4, width_samples=4, seqlen=64, mlp_group=4)
    record = pruned(step, family).pliant_history[0]
    assert record["ratio"] >= 0.2
    assert "attention heads" not in record["counters"]
