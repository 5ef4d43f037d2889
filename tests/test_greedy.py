"""The greedy loop alone, on made-up scores."""

import math
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.elastic import Subnet
from pliant.errors import WeightError
from pliant.searches import Greedy, Move


def block_moves(names):
    """Offer every name that is still there, in the order given."""
    return lambda subnet: [Move(name, subnet.without(name)) for name in names if name not in subnet.skip]


class Search:
    """One run, remembering what was looked at and what was committed."""

    def __init__(self, how, moves, score, more=lambda _: True, start=Subnet()):
        self.looked, self.per_step = [], [0]
        greedy = Greedy(start, moves, more, **how)
        while not greedy.done:
            for subnet in greedy.ask():
                self.looked.append(subnet)
                self.per_step[-1] += 1
                greedy.tell(subnet, [score(subnet)])
            self.per_step += [0] * (1 + len(greedy.taken) - len(self.per_step))
        self.units, self.losses = [move.unit for move, _ in greedy.taken], [loss for _, loss in greedy.taken]
        self.result = greedy.subnet


def removing(count):
    return lambda subnet: len(subnet.skip) < count


def additive(damage):
    return lambda subnet: 1.0 + sum(damage[name] for name in subnet.skip)


def lazy(slack=0.3, refresh=16):
    return {"mode": "lazy", "slack": slack, "refresh": refresh}


EXACT, NAIVE = {"mode": "exact"}, {"mode": "naive"}

NAMES = [f"layers.{layer}.{kind}" for layer in range(20) for kind in ("attention", "mlp")]


def test_on_additive_damage_lazy_removes_the_same_as_exact_with_far_fewer_scores():
    damage = {name: (i * 17 % 40 + 1) / 64 for i, name in enumerate(NAMES)}  # sums of these are exact
    quick, exact = (Search(how, block_moves(NAMES), additive(damage), removing(15)) for how in (lazy(refresh=0), EXACT))
    assert quick.units == exact.units == sorted(NAMES, key=damage.get)[:15]
    assert quick.losses == exact.losses
    assert quick.result == exact.result
    assert len(exact.looked) == 1 + sum(range(40, 25, -1))
    # everything once, then the neighbours, up to two, and what is within three tenths of the next best
    assert quick.per_step == [1 + 40, 2, 4, 4, 5, 5, 6, 6, 6, 7, 7, 8, 8, 9, 9, 0]


@given(damage=st.lists(st.integers(-8, 8), min_size=1, max_size=8), refresh=st.integers(0, 3))
def test_on_any_additive_damage_lazy_equals_exact_ties_and_gains_included(damage, refresh):
    by_name = dict(zip(NAMES, damage, strict=False))
    names = list(by_name)
    quick = Search(lazy(refresh=refresh), block_moves(names), additive(by_name))
    exact = Search(EXACT, block_moves(names), additive(by_name))
    assert quick.units == exact.units
    assert quick.losses == exact.losses


@pytest.mark.parametrize("mode", ["lazy", "exact", "naive"])
def test_of_equal_scores_the_earliest_offered_goes(mode):
    names = ["c", "a", "b", "d"]
    damage = {"c": 2, "a": 1, "b": 1, "d": 1}
    search = Search({"mode": mode}, block_moves(names), additive(damage))
    assert search.units == ["a", "b", "d", "c"]


def tabled(values):
    """A score that draws a value from a fixed table for every sub-network: no structure at all."""
    return lambda subnet: 0.5 if not subnet.skip else values[crc32(str(subnet).encode()) % len(values)]


numbers = st.floats(0, 100, allow_nan=False)
anything = st.one_of(numbers, st.sampled_from([math.nan, math.inf, -math.inf]))


def outcome(how, moves, score):
    """What was committed and what came of it, an error included."""
    greedy = Greedy(Subnet(), moves, lambda _: True, **how)
    error = None
    try:
        greedy.run(lambda subnet: [score(subnet)])
    except WeightError as raised:
        error = str(raised)
    return [(move.unit, loss) for move, loss in greedy.taken], error


@given(values=st.lists(numbers, min_size=2, max_size=40), size=st.integers(1, 12))
def test_with_all_the_slack_lazy_equals_exact_where_every_removal_hurts(values, size):
    moves, score = block_moves(NAMES[:size]), tabled(values)

    def growing(subnet):  # by 1 to 201 with every unit that goes
        return score(subnet) + 101 * len(subnet.skip)

    assert outcome(lazy(1.0, 0), moves, growing) == outcome(EXACT, moves, growing)


@given(values=st.lists(anything, min_size=2, max_size=40), size=st.integers(1, 6))
def test_refreshing_at_every_step_equals_exact_whatever_the_scores(values, size):
    moves = block_moves(NAMES[:size])
    assert outcome(lazy(0.0, 1), moves, tabled(values)) == outcome(EXACT, moves, tabled(values))


@given(values=st.lists(anything, min_size=2, max_size=40), size=st.integers(1, 6))
@settings(max_examples=50)
def test_naive_and_exact_look_at_the_same_and_decide_the_same(values, size):
    moves = block_moves(NAMES[:size])
    looked = {"naive": [], "exact": []}
    outcomes = []
    for how in (NAIVE, EXACT):
        score = tabled(values)
        outcomes.append(outcome(how, moves, lambda s, seen=looked[how["mode"]], f=score: seen.append(s) or f(s)))
    assert outcomes[0] == outcomes[1]
    assert looked["naive"] == looked["exact"]


FIRST = {"a": 0.5, "b": 4, "c": 1, "d": 1.5, "e": 2, "f": 3}


def shrinking(subnet):
    """``b`` hurts least once ``a`` is gone, and most before: what lazy foresees only where it stands next to ``a``."""
    damage = {**FIRST, "b": 0.25} if "a" in subnet.skip else FIRST
    return 1 + sum(damage[name] for name in subnet.skip)


def test_slack_widens_what_is_looked_at_to_units_that_hurt_less_than_before():
    moves = block_moves("acdbef")
    assert Search(EXACT, moves, shrinking, removing(2)).units == ["a", "b"]
    strict = Search(lazy(0), moves, shrinking, removing(2))
    assert strict.units == ["a", "c"]
    assert strict.per_step == [7, 1, 0]
    loose = Search(lazy(0.75), moves, shrinking, removing(2))
    assert loose.units == ["a", "b"]
    assert loose.per_step == [7, 5, 0]
    assert Search(lazy(0.74), moves, shrinking, removing(2)).units == ["a", "c"]


@pytest.mark.parametrize(
    ("names", "found"),
    [("abcdef", "b"), ("cbadef", "b"), ("bacdef", "b"), ("fedcba", "b"), ("acbdef", "c"), ("bcadef", "c")],
)
def test_what_stands_next_to_a_unit_that_is_gone_is_looked_at_without_slack(names, found):
    search = Search(lazy(0), block_moves(names), shrinking, removing(2))
    assert search.units == ["a", found]


@pytest.mark.parametrize("slack", [0, 0.1, 1])
def test_a_unit_without_a_finite_score_waits_until_what_is_near_it_goes(slack):
    damage = {name: float(i) for i, name in enumerate("abcdefgh")}

    def score(subnet):
        return math.inf if "h" in subnet.skip and len(subnet.skip) == 1 else additive(damage)(subnet)

    search = Search(lazy(slack, 0), block_moves("abcdefgh"), score)
    assert search.units == list("abcdefgh")
    assert Subnet().without(*"ah") not in search.looked


def test_refresh_scores_everything_again_at_that_step_only():
    damage = {name: float(i) for i, name in enumerate(NAMES[:12])}
    search = Search(lazy(0, 4), block_moves(NAMES[:12]), additive(damage), removing(10))
    assert search.per_step == [1 + 12, 1, 1, 1, 8, 1, 1, 1, 4, 1, 0]
    search = Search(lazy(0, 0), block_moves(NAMES[:12]), additive(damage), removing(10))
    assert search.per_step == [1 + 12, *[1] * 9, 0]


def test_refresh_finds_what_lazy_lost_sight_of():
    moves = block_moves("acdbef")
    assert Search(lazy(refresh=1), moves, shrinking, removing(2)).units == ["a", "b"]


@pytest.mark.parametrize("mode", ["lazy", "exact", "naive"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_never_wins(mode, bad):
    damage = {"a": 3, "b": 2, "c": 1}

    def score(subnet):
        return bad if "c" in subnet.skip and len(subnet.skip) < 3 else additive(damage)(subnet)

    assert Search({"mode": mode}, block_moves("cab"), score).units == ["b", "a", "c"]


@pytest.mark.parametrize("mode", ["lazy", "exact", "naive"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_without_any_finite_score_the_search_says_so(mode, bad):
    def score(subnet):
        return bad if len(subnet.skip) == 2 else 1.0

    committed, error = outcome({"mode": mode}, block_moves("abc"), score)
    assert error is not None
    assert "no removal leaves a finite loss" in error
    assert committed == [("a", 1.0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_without_a_finite_loss_is_refused(bad):
    with pytest.raises(WeightError, match=f"loss on the calibration text is {bad}"):
        Search({}, block_moves("abc"), lambda _: bad)


def width_moves(size, group):
    """Offer the next group of every axis, as long as something stays."""

    def moves(subnet):
        kept = dict.fromkeys(("layers.0.mlp.channels", "layers.1.mlp.channels"), size) | dict(subnet.keep)
        return [Move(axis, subnet.keeping(axis, n - group)) for axis, n in kept.items() if n > group]

    return moves


@pytest.mark.parametrize("mode", ["lazy", "exact", "naive"])
def test_a_unit_is_offered_again_for_its_next_group_and_looked_at_afresh(mode):
    rising = {"layers.0.mlp.channels": [0, 1, 2, 9], "layers.1.mlp.channels": [0, 4, 5, 6]}  # by groups gone

    def score(subnet):
        return sum(rising[axis][(12 - kept) // 4] for axis, kept in subnet.keep) if subnet.keep else 0.0

    search = Search({"mode": mode}, width_moves(12, 4), score)
    first, second = rising
    assert search.units == [first, first, second, second]
    assert search.losses == [1, 2, 6, 7]
    assert search.result == Subnet().keeping(first, 4).keeping(second, 4)


def test_what_stands_next_to_a_unit_that_is_narrower_is_looked_at_again():
    rising = {axis: [0, first, first + 1, 99] for axis, first in zip("abcdef", (40, 1, 44, 43, 41, 42), strict=True)}

    def moves(subnet):
        kept = dict.fromkeys(rising, 12) | dict(subnet.keep)
        return [Move(axis, subnet.keeping(axis, n - 4)) for axis, n in kept.items() if n > 4]

    def score(subnet):
        return sum(rising[axis][(12 - kept) // 4] for axis, kept in subnet.keep) if subnet.keep else 0.0

    search = Search(lazy(0), moves, score, lambda subnet: dict(subnet.keep).get("a", 12) == 12)
    assert search.units == ["b", "b", "a"]
    # all; b, and a and c beside it; b has no group left to give, a and c are as they were
    assert search.per_step == [1 + 6, 3, 2, 0]


def test_weighing_by_parameters_prefers_what_saves_more():
    """Of two units that hurt alike, the larger goes."""

    def moves(subnet):
        return [Move(n, subnet.without(n)) for n in ("small", "large") if n not in subnet.skip]

    greedy = Greedy(
        Subnet(),
        moves,
        lambda subnet: not subnet.skip,
        lambda _subnet, move: {"small": 1.0, "large": 2.0}[move.unit],
        mode="exact",
    )
    greedy.run(lambda subnet: [float(len(subnet.skip))])
    assert [move.unit for move, _loss in greedy.taken] == ["large"]


def test_the_search_stops_when_nothing_is_offered():
    search = Search({}, block_moves("ab"), additive({"a": 1, "b": 2}))
    assert search.units == ["a", "b"]
    assert search.result.skip == {"a", "b"}
    assert Search({}, lambda _: [], lambda _: 1.0).result == Subnet()


def test_the_search_stops_when_no_more_is_wanted_and_looks_at_nothing_else():
    search = Search(EXACT, block_moves("abc"), additive({"a": 1, "b": 2, "c": 3}), lambda _: False)
    assert search.units == []
    assert search.looked == [Subnet()]
    start = Subnet().without("b")
    search = Search(EXACT, block_moves("abc"), additive({"a": 1, "b": 2, "c": 3}), removing(2), start)
    assert search.units == ["a"]
    assert search.result.skip == {"a", "b"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mode": "random"}, "mode must be one of lazy, exact, naive; not 'random'"),
        ({"mode": None}, "mode must be one of .*; not None"),
        ({"slack": -0.1}, "slack must be a number from 0 to 1"),
        ({"slack": 1.1}, "slack must be a number from 0 to 1"),
        ({"slack": math.nan}, "slack must be a number from 0 to 1"),
        ({"refresh": -1}, "refresh must be at least 0; not -1"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Greedy(Subnet(), block_moves("ab"), lambda _: True, **settings)
