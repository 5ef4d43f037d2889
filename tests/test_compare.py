import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from pico import pico
from pliant.data import OpenQuestion, Question
from pliant.errors import DataError
from pliant.measure.quality.compare import difference, without_items

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)


def _result(acc, digest="same"):
    share = sum(acc) / len(acc)
    return {"perplexity": {}, "tasks": {"arc": {"acc": share, "items": {"digest": digest, "acc": list(acc)}}}}


def _compared(a, b):
    return pliant.compare(_result(a), _result(b))["tasks"]["arc"]["acc"]


@settings(max_examples=30, deadline=None)
@given(BITS)
def test_swapping_flips_the_sign_and_nothing_else(pairs):
    a, b = zip(*pairs, strict=True)
    there, back = _compared(a, b), _compared(b, a)
    assert there["difference"] == -back["difference"]
    assert [there["low"], there["high"]] == pytest.approx([-back["high"], -back["low"]])
    assert there["p"] == back["p"]
    assert there["items"] == len(pairs)
    assert there["low"] <= there["difference"] <= there["high"]
    assert 0 < there["p"] <= 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 20), min_size=2, max_size=40))
def test_a_result_does_not_differ_from_itself(losses):
    found = _compared(losses, losses)
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)


def test_the_same_seed_gives_the_same_interval():
    drawn = np.random.default_rng(1).normal(size=50)
    assert difference(drawn, 3) == difference(drawn, 3)
    assert difference(drawn, 3) != difference(drawn, 4)


def test_the_interval_is_that_of_the_normal_approximation_when_there_are_many():
    drawn = np.random.default_rng(0).normal(0.05, 1, size=4000)
    found = difference(drawn)
    error = drawn.std() / 4000**0.5
    assert [found["low"], found["high"]] == pytest.approx(
        [drawn.mean() - 1.96 * error, drawn.mean() + 1.96 * error], abs=0.1 * error
    )


def test_p_is_small_where_the_interval_leaves_out_zero():
    sure = _compared([1] * 30 + [0] * 10, [0] * 25 + [1] * 5 + [0] * 10)
    assert sure["low"] > 0
    assert sure["p"] < 0.001
    unsure = _compared([1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1])
    assert unsure["low"] < 0 < unsure["high"]
    assert unsure["p"] > 0.5


def test_p_is_rarely_small_when_there_is_no_difference():
    draw = np.random.default_rng(0)
    below = sum(difference(draw.normal(size=40))["p"] < 0.05 for _ in range(100))
    assert below <= 15


def test_a_single_item_has_a_difference_but_no_certainty():
    assert _compared([1], [0]) == {"difference": 1, "low": None, "high": None, "p": None, "items": 1}


def test_results_on_other_items_are_refused():
    with pytest.raises(DataError, match="'arc' are not on the same items"):
        pliant.compare(_result([1, 0]), _result([1, 0], digest="other"))
    with pytest.raises(DataError, match="not on the same tasks: 'arc' is only in one"):
        pliant.compare(_result([1, 0]), {"perplexity": {}, "tasks": {}})


def test_results_without_items_are_refused():
    bare = without_items(_result([1, 0]))
    assert bare == {"perplexity": {}, "tasks": {"arc": {"acc": 0.5}}}
    with pytest.raises(DataError, match="items=True"):
        pliant.compare(bare, bare)


# with models

TASKS = {
    "choose": [Question(f"{number} is", (" odd", " even, surely"), number % 2) for number in range(8)],
    "write": [OpenQuestion(f"{number} + 1 =", str(number + 1)) for number in range(3)],
}


def _measured(model, tokenizer, prose, **options):
    settings = {"perplexity": prose, "tasks": TASKS, "seqlen": 32, "windows": 6, "max_new_tokens": 4, "items": True}
    return pliant.evaluate(model, tokenizer=tokenizer, **settings | options)


def test_two_models_are_compared_on_texts_and_tasks(model, tokenizer, prose):
    a, b = _measured(model, tokenizer, prose), _measured(pico("llama", seed=1), tokenizer, prose)
    found = pliant.compare(a, json.loads(json.dumps(b)))
    loss = found["perplexity"]["prose.txt"]["loss"]
    assert loss["difference"] == pytest.approx(
        a["perplexity"]["prose.txt"]["loss"] - b["perplexity"]["prose.txt"]["loss"]
    )
    assert loss["low"] < loss["difference"] < loss["high"]
    assert loss["items"] == 6
    for metric in ("acc", "acc_norm"):
        row = found["tasks"]["choose"][metric]
        assert row["difference"] == pytest.approx(a["tasks"]["choose"][metric] - b["tasks"]["choose"][metric])
        assert row["items"] == 8
    assert found["tasks"]["write"]["match"]["items"] == 3
    assert pliant.compare(a, a)["perplexity"]["prose.txt"]["loss"]["p"] == 1


@pytest.mark.parametrize(
    "other",
    [
        {"windows": 5},
        {"seqlen": 16, "windows": 12},
        {"max_new_tokens": 5},
        {"tasks": TASKS | {"choose": TASKS["choose"][:-1]}},
        {"tasks": TASKS | {"choose": TASKS["choose"][::-1]}},
    ],
)
def test_other_settings_are_other_items(model, tokenizer, prose, other):
    a, b = _measured(model, tokenizer, prose), _measured(model, tokenizer, prose, **other)
    with pytest.raises(DataError, match="not on the same items"):
        pliant.compare(a, b)


def test_items_are_only_kept_when_asked_for(model, tokenizer, prose):
    kept, bare = _measured(model, tokenizer, prose), _measured(model, tokenizer, prose, items=False)
    assert without_items(kept) == bare
    assert "items" not in json.dumps(bare)
    text, choose = kept["perplexity"]["prose.txt"], kept["tasks"]["choose"]
    assert sum(text["items"]["loss"]) / 6 == pytest.approx(text["loss"])
    assert sum(choose["items"]["acc"]) / 8 == choose["acc"]
    assert len(kept["tasks"]["write"]["items"]["match"]) == 3


def test_an_item_without_a_number_leaves_the_difference_open():
    found = _compared([0.5, math.nan, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4])
    assert math.isnan(found["difference"])
    assert found["low"] is found["high"] is found["p"] is None
