"""Every method ends less than one unit above its ratio, or refuses."""

from itertools import pairwise, product

import pytest

import pliant
from pico import pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.criteria.block_ranking import RANKINGS
from pliant.elastic import Subnet, parameters, ratio
from pliant.errors import RatioError
from pliant.prune.moves import block_moves, fitting, layer_moves, pooled, width_moves
from pliant.prune.put_back import Removal, put_backs
from pliant.prune.ratio_target import by_parameters
from pliant.prune.width_cuts import cut_until, widths
from pliant.registry import STEPS
from pliant.step import settings_of, step_class

WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "looked", "at", "dogs", "that", "ran", "over", "hills"]
TEXT = pliant.text([" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) for i in range(1, 30)])
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5)
FEW = {"samples": 2, "seqlen": 32}
GREEDY = {"channels": 8, "kv": 1, "experts": 1}  # units in a group


def smallest(anatomy, moves):
    return min(ratio(anatomy, move.subnet) for move in moves(Subnet()))


def smallest_step(anatomy, group):
    firsts = {axis.name: widths(axis, group)[0] for axis in anatomy.axes.values() if widths(axis, group)}
    return min(ratio(anatomy, Subnet().keeping(name, units)) for name, units in firsts.items())


def greedy_unit(anatomy):
    return smallest(anatomy, pooled(block_moves(anatomy), width_moves(anatomy, GREEDY)))


# name -> (how a step is made, the smallest share that it can take from the dense model)
METHODS = {
    "blockpruner": (pliant.BlockPruner, {}, lambda a: smallest(a, block_moves(a))),
    # its last stage is that of the heads
    "multipruner": (
        pliant.MultiPruner,
        {"width_samples": 2, "mlp_group": 8},
        lambda a: smallest(a, width_moves(a, {"kv": 1})),
    ),
    "multipruner_evol": (
        pliant.MultiPrunerEvol,
        {"width_samples": 2, "mlp_group": 8, "population": 8, "generations": 3, "tolerance": 0.02},
        greedy_unit,
    ),
    "mamba_shedder": (pliant.MambaShedder, {}, lambda a: smallest(a, block_moves(a))),
    "mamba_shedder of parts": (
        pliant.MambaShedder,
        {"target": "attention+mlp+channels", "mlp_group": 8},
        lambda a: smallest(a, pooled(block_moves(a), width_moves(a, {"channels": 8}))),
    ),
    "oneshot": (pliant.OneShot, {}, lambda a: smallest(a, block_moves(a))),
    "oneshot of layers": (pliant.OneShot, {"granularity": "layer"}, lambda a: smallest(a, layer_moves(a))),
    "unified": (pliant.UnifiedPruner, {"mlp_group": 8}, greedy_unit),
    "knapsack": (pliant.KnapsackPruner, {"group": 8, "swaps": 4}, lambda a: smallest_step(a, 8)),
    "knapsack of few widths": (
        pliant.KnapsackPruner,
        {"group": 8, "levels": 1, "swaps": 4},
        lambda a: smallest_step(a, 8),
    ),
    "knapsack of whole blocks": (
        pliant.KnapsackPruner,
        {"levels": 0, "swaps": 4},
        lambda a: smallest(a, block_moves(a)),
    ),
    "fisher": (pliant.FisherPruner, {"group": 8}, lambda a: smallest_step(a, 8)),
    "channelpruner": (pliant.ChannelPruner, {"group": 8}, lambda a: smallest_step(a, 8)),
}
# (method, ratio, layers) where all that may go is less than the ratio
BEYOND = {("oneshot of layers", 0.5, 4), ("fisher", 0.5, 4), ("channelpruner", 0.5, 4)}


def test_every_pruner_is_in_the_table():
    assert {name.split(" of ")[0] for name in METHODS} == {
        name for name in STEPS if "ratio" in settings_of(step_class(name))
    }


@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("wanted", RATIOS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_ends_within_one_unit_of_its_ratio_or_refuses(name, wanted, depth):
    cls, settings, unit = METHODS[name]
    model = pico("llama", num_hidden_layers=depth)
    anatomy = anatomy_of(model)
    dense = sum(parameter.numel() for parameter in model.parameters())
    step = cls(ratio=wanted, **settings, **(FEW if cls is not pliant.ChannelPruner else {}))
    if (name, wanted, depth) in BEYOND:
        with pytest.raises(RatioError, match=rf"ratio {wanted} cannot be reached: .* removes 0\.49"):
            pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
        return
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    reached = 1 - sum(parameter.numel() for parameter in model.parameters()) / dense
    assert wanted - 1e-9 <= reached < wanted + unit(anatomy)


UNEVEN = {  # MLPs are four times as large as attentions, or more
    "llama": {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"head_dim": 6},
    "mixtral": {},
}
ON_UNEVEN = [
    *(("blockpruner", {}), ("oneshot of layers", {}), ("multipruner", {}), ("unified", {})),
    ("mamba_shedder of parts", {}),
    *(("knapsack", {}), ("knapsack of whole blocks", {}), ("multipruner_evol", {})),
    *(("oneshot", {"by": by}) for by in (*RANKINGS, "perplexity", "random")),
]


@pytest.mark.parametrize("wanted", [0.1, 0.3])
@pytest.mark.parametrize(("name", "more"), ON_UNEVEN, ids=lambda given: given if isinstance(given, str) else None)
@pytest.mark.parametrize("family", UNEVEN)
def test_blocks_of_very_different_size_end_within_one_unit_or_are_refused(family, name, more, wanted):
    cls, settings, unit = METHODS[name]
    model = pico(family, num_hidden_layers=4, **UNEVEN[family])
    anatomy, before = anatomy_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    dense = sum(parameter.numel() for parameter in model.parameters())
    step = cls(ratio=wanted, **{**settings, **FEW, **more})
    of_blocks = name in ("blockpruner", "oneshot", "oneshot of layers", "knapsack of whole blocks")
    if of_blocks and not any(wanted <= share < wanted + unit(anatomy) for share in shares(anatomy, name)):
        with pytest.raises(RatioError, match=r"cannot be reached within one unit, .* give one of these"):
            pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())
        return
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    reached = 1 - sum(parameter.numel() for parameter in model.parameters()) / dense
    assert wanted - 1e-9 <= reached < wanted + unit(anatomy)
    assert model.pliant_history[0]["points"][-1]["ratio"] == pytest.approx(reached)


def shares(anatomy, name):
    """Everything that whole blocks or layers can come to; one attention stays."""
    offered = (layer_moves if "layers" in name else block_moves)(anatomy)(Subnet())
    sizes = [ratio(anatomy, move.subnet) for move in offered]
    most = sum(not (move.unit.endswith("mlp")) for move in offered) - 1
    return {
        sum(size for size, goes in zip(sizes, chosen, strict=True) if goes)
        for chosen in product((False, True), repeat=len(sizes))
        if sum(goes and not move.unit.endswith("mlp") for move, goes in zip(offered, chosen, strict=True)) <= most
    }


def test_what_was_too_much_is_put_back_scored_and_resumed(tmp_path):
    step = pliant.BlockPruner(ratio=0.3, **FEW)
    records = []
    for _ in range(2):
        model = pico("llama", num_hidden_layers=4, **UNEVEN["llama"])
        pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False, work=tmp_path)
        records.append(model.pliant_history[0])
    first, again = records
    back = [point for point in first["points"] if point["stage"] == "put back"]
    assert len(back) == first["counters"]["put back"]["steps"] == 3
    assert all(point["unit"].endswith("attention put back") and point["loss"] is not None for point in back)
    assert first["counters"]["put back"]["evaluations"] > 0 == again["counters"]["put back"]["evaluations"]
    assert (first["points"], first["subnet"]) == (again["points"], again["subnet"])


def test_of_units_that_may_come_back_the_one_that_hurt_most_does():
    anatomy = anatomy_of(pico("llama", **UNEVEN["llama"]))
    small, large = (ratio(anatomy, Subnet().without(f"layers.0.{kind}")) for kind in ("attention", "mlp"))
    unit = round(small * parameters(anatomy))

    def back(target, *gone):
        removals, subnet = [], Subnet()
        for block, hurt in gone:
            removals.append(Removal(block, subnet, subnet.without(f"layers.{block}"), hurt))
            subnet = removals[-1].after
        return [one.unit for one in put_backs(by_parameters(anatomy), removals, target, unit)]

    gone = [("0.attention", 0.1), ("1.attention", 0.3), ("2.attention", 0.2), ("0.mlp", 5.0)]
    assert back(large + 3 * small, *gone) == []
    assert back(large + 2 * small, *gone) == ["1.attention"]
    assert back(large + small, *gone) == ["1.attention", "2.attention"]
    assert back(3 * small, *gone) == ["0.mlp"]
    assert back(2 * small, *gone) == ["0.mlp", "1.attention"]
    unknown = [(block, float("nan")) for block, _ in gone]
    assert back(large + 2 * small, *unknown) == ["2.attention"]
    with pytest.raises(RatioError, match=rf"the nearest .* is 0\.0{int(small * 1e4)} or 0\.{int(large * 1e4)}; give"):
        back(2 * small, gone[0], gone[3])


def test_widths_come_back_last_first():
    anatomy = anatomy_of(pico("llama"))
    states = [Subnet(), Subnet().keeping("layers.0.mlp.channels", 40), Subnet().keeping("layers.0.mlp.channels", 32)]
    states.append(states[-1].without("layers.0.mlp"))
    removals = [
        Removal(str(i), *pair, hurt) for i, (pair, hurt) in enumerate(zip(pairwise(states), (9, 1, 1), strict=True))
    ]
    unit = round(ratio(anatomy, states[1]) * parameters(anatomy))
    back = put_backs(by_parameters(anatomy), removals, ratio(anatomy, states[1]), unit)
    assert [one.unit for one in back] == ["2", "1"]
    subnet = states[-1]
    for one in back:
        subnet = one.undone(subnet)
    assert subnet == states[1]


def test_a_block_that_is_too_large_is_passed_over():
    anatomy = anatomy_of(pico("llama"))
    moves = pooled(block_moves(anatomy), width_moves(anatomy, GREEDY))
    target = 0.03
    assert all(ratio(anatomy, move.subnet) > 2 * target for move in block_moves(anatomy)(Subnet()))
    offered = fitting(by_parameters(anatomy), moves, target)(Subnet())
    assert {move.unit for move in offered} == set(anatomy.axes)
    assert len(fitting(by_parameters(anatomy), moves, 0.9)(Subnet())) == len(moves(Subnet()))
    # alone, blocks are the smallest units
    assert len(fitting(by_parameters(anatomy), block_moves(anatomy), target)(Subnet())) == len(
        block_moves(anatomy)(Subnet())
    )
    assert not fitting(by_parameters(anatomy), block_moves(anatomy), target, units=moves)(Subnet())


def test_cuts_are_passed_over_and_put_back_until_none_is_too_much():
    sizes = {"a": [10, 4, 0], "b": [10, 9, 8, 7]}  # what is left after each cut

    def gone(subnet):
        kept = dict(subnet.keep)
        return sum(of[0] - kept.get(name, of[0]) for name, of in sizes.items())

    def until(cuts, target):
        return cut_until(cuts, gone, target)

    cuts = [("b", 9), ("a", 4), ("b", 8), ("a", 0), ("b", 7)]
    assert until(cuts, 1).keep == (("b", 9),)
    assert until(cuts, 2).keep == (("b", 8),)  # a would take 6
    assert until(cuts, 3).keep == (("b", 7),)
    assert gone(until(cuts, 4)) == 6  # 1 + 6 is one too much, so b is put back
    assert until(cuts, 7).keep == (("a", 4), ("b", 9))
    assert gone(until(cuts, 13)) == 13
    assert until(cuts, 14) is None


def test_a_knapsack_of_harmful_blocks_does_not_take_more_than_asked(monkeypatch):
    """Where removals lower the loss, as in random models, all of them together did so most."""
    model = pico("llama", num_hidden_layers=8)
    monkeypatch.setattr("pliant.prune.session.PrefixScorer.score", lambda _, subnet: 5 - 0.1 * len(subnet.skip))
    step = pliant.KnapsackPruner(ratio=0.2, group=8, **FEW)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    assert 0.2 <= model.pliant_history[0]["ratio"] < 0.21
