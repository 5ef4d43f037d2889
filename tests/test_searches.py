"""Searches by ask and tell, over a space of made-up blocks and axes."""

import itertools
import math
import random
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico import leader, pico
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, ratio
from pliant.elastic.subnet import validate
from pliant.errors import StepError, WeightError
from pliant.prune.moves import block_moves, pooled, width_moves
from pliant.searches import (
    NSGA2,
    Allocation,
    Archive,
    Greedy,
    HillClimb,
    Limits,
    RandomSearch,
    Space,
    SpaceSearch,
    search_of,
)
from pliant.searches.allocation import allocate

SPACE = Space(
    blocks=("0.attention", "0.mlp", "1.attention", "1.mlp"),
    axes=(("0.mlp.channels", (8, 6, 4, 2)), ("1.mlp.channels", (8, 4)), ("adapter.rank", (16, 8, 4))),
    stay=(frozenset({"0.attention", "1.attention"}),),
)


def tabled(values):
    """A loss without any structure: a fixed table, looked up by what a sub-network is."""
    return lambda subnet: values[crc32(str(subnet).encode()) % len(values)]


def size(subnet):
    """A cost: 10 for every block, and what is kept of every axis."""
    kept = {name: sizes[0] for name, sizes in SPACE.axes} | dict(subnet.keep)
    there = [name for name in kept if name.rpartition(".")[0] not in subnet.skip]
    return 40 - 10 * len(subnet.skip) + sum(kept[name] for name in there)


numbers = st.floats(-100, 100, allow_nan=False)
tables = st.lists(st.one_of(numbers, st.sampled_from([math.nan, math.inf])), min_size=1, max_size=40)
seeds = st.integers(0, 2**32 - 1)


# --- the space
# ------------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_a_sample_is_allowed_and_comes_back_from_its_integers(seed):
    subnet = SPACE.sample(random.Random(seed))
    assert SPACE.allows(subnet)
    places = SPACE.encode(subnet)
    assert all(0 <= place < count for place, count in zip(places, SPACE.counts, strict=True))
    assert SPACE.decode(places) == subnet


@given(seed=seeds)
def test_neighbours_differ_by_one_step_and_are_neighbours_of_each_other(seed):
    subnet = SPACE.sample(random.Random(seed))
    near = SPACE.neighbours(subnet)
    assert near
    for other in near:
        assert SPACE.allows(other)
        apart = [abs(a - b) for a, b in zip(SPACE.encode(subnet), SPACE.encode(other), strict=True)]
        axes_of_gone = len(subnet.skip ^ other.skip) == 1  # widths inside a block that goes are forgotten
        assert sum(apart) == 1 or axes_of_gone
        assert axes_of_gone or subnet in SPACE.neighbours(other)


def test_the_last_block_of_a_set_stays_and_the_dense_model_is_all_zeros():
    assert SPACE.encode(Subnet()) == (0,) * 7
    one = Subnet().without("0.attention")
    assert one.without("1.attention") not in SPACE.neighbours(one)
    assert hash(SPACE) == hash(Space(SPACE.blocks, SPACE.axes, SPACE.stay))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_the_space_of_a_model_holds_what_greedy_moves_lead_to_and_nothing_that_the_model_cannot_take(name):
    anatomy = anatomy_of(pico(name))
    groups = {"channels": 8, "experts": 1, leader(name): 1}
    space = Space.of(anatomy, groups, list(anatomy.blocks))
    offered = {move.subnet for move in pooled(block_moves(anatomy), width_moves(anatomy, groups))(Subnet())}
    assert offered == set(space.neighbours(Subnet()))
    draw = random.Random(0)
    for _ in range(20):
        validate(space.sample(draw), anatomy)
    enough = space.shrunk(lambda subnet: ratio(anatomy, subnet) >= 0.2, np.random.default_rng(0))
    assert ratio(anatomy, enough) >= 0.2
    validate(space.shrunk(lambda _: False, np.random.default_rng(0)), anatomy)


# --- searches
# -------------------------------------------------------------------------------------------------------------


@given(values=tables, seed=seeds, tries=st.integers(0, 30))
def test_hill_climbing_never_ends_worse_than_it_began(values, seed, tries):
    loss = tabled(values)
    start = SPACE.sample(random.Random(seed))
    climb = HillClimb(SPACE, [start], tries, seed)
    climb.run(lambda subnet: [loss(subnet)])
    assert not loss(climb.subnet) > loss(start)
    assert not (math.isfinite(loss(start)) and not math.isfinite(loss(climb.subnet)))
    assert len(climb.seen) <= tries + 1


def test_hill_climbing_finds_the_bottom_of_a_slope():
    climb = HillClimb(SPACE, [Subnet()], 300)
    climb.run(lambda subnet: [sum(SPACE.encode(subnet)[4:]) - 3 * len(subnet.skip)])
    assert len(climb.subnet.skip) == 3
    assert climb.subnet.keep == ()


@given(seed=seeds, most=st.integers(20, 74))
@settings(max_examples=30)
def test_no_candidate_exceeds_a_limit(seed, most):
    limits = Limits(((size, most),))
    draw = random.Random(seed)
    searches = [
        RandomSearch(SPACE, [Subnet()], 5, seed, limits),
        NSGA2(SPACE, [SPACE.sample(draw) for _ in range(4)], 12, seed % 1000, limits),
    ]
    if size(start := SPACE.sample(draw)) <= most:
        searches.append(HillClimb(SPACE, [Subnet(), start], 20, seed, limits))
    for search in searches:
        search.run(lambda subnet: [tabled([1.0, 2.0, 3.0])(subnet), size(subnet)])
        assert all(size(subnet) <= most for subnet in search.seen)
        assert all(SPACE.allows(subnet) for subnet in search.seen)


def test_a_search_without_an_algorithm_is_refused_before_any_work():
    with pytest.raises(StepError, match=r"the search 'pliant\.searches:SpaceSearch' has no method candidates"):
        search_of("pliant.searches:SpaceSearch")


def test_random_search_ends_where_the_space_ends():
    few = Space(axes=(("a.rank", (4, 2)), ("b.rank", (4, 2, 1))))
    search = RandomSearch(few, [Subnet()], 100)
    search.run(lambda _: [0.0])
    assert len(search.seen) == 6


def test_evolution_finds_more_of_the_front_than_its_first_generation():
    draw = random.Random(0)
    first = [SPACE.sample(draw) for _ in range(12)]
    search = NSGA2(SPACE, first, 180, seed=0)

    def values(subnet):
        places = SPACE.encode(subnet)
        return [float(sum(i * place for i, place in enumerate(places, 1))), float(-sum(places))]

    search.run(values)

    def volume(found):
        """Area that a set of points dominates, up to (40, 0)."""
        area, left = 0.0, 0.0
        for loss, saved in sorted(values(one) for one in found):
            if -saved > left and loss < 40:
                area, left = area + (40 - loss) * (-saved - left), -saved
        return area

    assert volume(search.seen) > volume(first)


def made(name, archive, evaluated):
    """A search of each kind, its objectives answered from an archive where it knows them."""
    draw = random.Random(3)
    search = {
        "nsga2": lambda: NSGA2(SPACE, [SPACE.sample(draw) for _ in range(6)], 24, seed=5),
        "hill": lambda: HillClimb(SPACE, [Subnet()], 20, 1),
        "random": lambda: RandomSearch(SPACE, [Subnet()], 10, 2),
        "greedy": lambda: Greedy(Subnet(), _shrinking, lambda subnet: len(subnet.skip) < 3),
        "allocation": lambda: Allocation(*_menus(), 12, 3, lambda picked: SPACE.decode((*picked, 0, 0, 0))),
    }[name]()

    def loss(subnet):
        known = archive.get(name, subnet)
        if known is None:
            known = tabled([1.5, 0.25, 3.0, 2.0, 7.0])(subnet)
            archive.put(name, subnet, known, 0.0)
            evaluated.append(subnet)
        return known

    search.run(lambda subnet: [loss(subnet), size(subnet)])
    return search


def _shrinking(subnet):
    from pliant.searches import Move

    return [Move(f"{i}", one) for i, one in enumerate(SPACE.neighbours(subnet)) if len(one.skip) > len(subnet.skip)]


def _menus():
    menus = [[Subnet(), Subnet().without(block)] for block in SPACE.blocks]
    return menus, [[int(size(Subnet()) - size(one)) for one in menu] for menu in menus]


@pytest.mark.parametrize("name", ["nsga2", "hill", "random", "greedy", "allocation"])
def test_every_search_replays_from_the_archive_without_a_new_evaluation(name, tmp_path):
    evaluated = []
    first = made(name, Archive(tmp_path / "search.jsonl", {"model": "m"}), evaluated)
    assert len(evaluated) == len(first.seen) > 4
    before = len(evaluated)
    again = made(name, Archive(tmp_path / "search.jsonl", {"model": "m"}), evaluated)
    assert len(evaluated) == before
    assert again.seen == first.seen
    assert again.done
    assert again.ask() == []
    # cut short after half of it, the rest follows
    lines = (tmp_path / "search.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "search.jsonl").write_bytes(b"".join(lines[: 1 + before // 2]))
    resumed = made(name, Archive(tmp_path / "search.jsonl", {"model": "m"}), evaluated)
    assert len(evaluated) == before + before - before // 2
    assert list(resumed.seen.items()) == list(first.seen.items())


# --- allocation
# -----------------------------------------------------------------------------------------------------------

menus = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.one_of(st.integers(-20, 60), st.just(math.inf))), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


@given(menus=menus, target=st.integers(1, 120), slack=st.sampled_from([0, 2, 20]), unit=st.sampled_from([1, 7_000_003]))
@settings(max_examples=60, deadline=None)
def test_allocation_finds_the_best_mix(menus, target, slack, unit):
    """Against every combination."""
    saved = [[0, *(unit * n for n, _ in menu)] for menu in menus]
    damage = [[0.0, *(float(d) for _, d in menu)] for menu in menus]
    mixes = [
        (sum(of[i] for of, i in zip(saved, mix, strict=True)), sum(of[i] for of, i in zip(damage, mix, strict=True)))
        for mix in itertools.product(*(range(len(menu)) for menu in saved))
    ]
    enough = [(s, d) for s, d in mixes if s >= unit * target and math.isfinite(d)]
    picked = allocate(saved, damage, unit * target, unit * slack)
    if not enough:
        assert picked is None
        return
    total = sum(of[i] for of, i in zip(saved, picked, strict=True))
    within = [d for s, d in enough if s <= unit * (target + slack)]
    if within:
        assert unit * target <= total <= unit * (target + slack)
        assert sum(of[i] for of, i in zip(damage, picked, strict=True)) == pytest.approx(min(within), abs=1e-6)
    else:
        assert total == min(s for s, _ in enough)


def test_an_allocation_over_a_dense_model_without_a_loss_is_refused():
    search = Allocation(*_menus(), 12, 3, lambda _: Subnet())
    with pytest.raises(WeightError, match="loss on the calibration text is nan"):
        search.run(lambda _: [math.nan])


class Endless(SpaceSearch):
    def candidates(self):
        while True:
            yield [self.start]


class Empty(SpaceSearch):
    def candidates(self):
        while True:
            yield []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Endless, "does not end: it asked for 301 sub-networks"),
        (Empty, "no candidates"),
    ],
)
def test_a_search_that_does_not_end_is_refused(kind, said):
    with pytest.raises(StepError, match=said):
        kind(Space(axes=(("a", (3, 2, 1)),)), [Subnet()], budget=2).run(lambda _: [1.0])
