"""Every method ends less than one unit above its ratio, or refuses."""

import pytest

import pliant
from pico import pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, ratio
from pliant.errors import RatioError
from pliant.search.groups import cut_until, widths
from pliant.search.moves import block_moves, fitting, layer_moves, pooled, width_moves
from pliant.systems import PRUNERS

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
    assert {name.split(" of ")[0] for name in METHODS} == PRUNERS


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
        with pytest.raises(RatioError, match=rf"ratio {wanted} cannot be reached: .* comes to 0\.49"):
            pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
        return
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    reached = 1 - sum(parameter.numel() for parameter in model.parameters()) / dense
    assert wanted - 1e-9 <= reached < wanted + unit(anatomy)


def test_a_block_that_is_too_large_is_passed_over():
    anatomy = anatomy_of(pico("llama"))
    moves = pooled(block_moves(anatomy), width_moves(anatomy, GREEDY))
    target = 0.03
    assert all(ratio(anatomy, move.subnet) > 2 * target for move in block_moves(anatomy)(Subnet()))
    offered = fitting(anatomy, moves, target)(Subnet())
    assert {move.unit for move in offered} == set(anatomy.axes)
    assert len(fitting(anatomy, moves, 0.9)(Subnet())) == len(moves(Subnet()))
    # alone, blocks are the smallest units
    assert len(fitting(anatomy, block_moves(anatomy), target)(Subnet())) == len(block_moves(anatomy)(Subnet()))
    assert not fitting(anatomy, block_moves(anatomy), target, units=moves)(Subnet())


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
    monkeypatch.setattr("pliant.search.pruning.Walk.score", lambda _, subnet, __=1.0: 5 - 0.1 * len(subnet.skip))
    step = pliant.KnapsackPruner(ratio=0.2, group=8, **FEW)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    assert 0.2 <= model.pliant_history[0]["ratio"] < 0.21
