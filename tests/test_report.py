"""report.html."""

import copy
import json
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.record import Table, to_dict
from pliant.run.card import table
from pliant.run.report import page
from reported import PACKED, REPORT, STEP, removal, with_speed
from reported import shown as _shown


def _with_kl():
    report = copy.deepcopy(REPORT)
    report["steps"][0]["settings"]["metric"] = "kl"
    for point, loss in zip(report["steps"][0]["points"], (0.0111, 0.0222, 0.0333), strict=True):
        point |= {"score": loss, "label": "KL to dense", "loss": loss}
    report["steps"] = [_shown({key: value for key, value in report["steps"][0].items() if key != "sections"})]
    return report


class Page(HTMLParser):
    """What a page shows, and whether every tag that opens is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.cells, self.tags, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


FORMS = {"plain": lambda: REPORT, "speed": with_speed, "kl": _with_kl}


@pytest.mark.parametrize("form", FORMS)
def test_the_page_fetches_nothing_and_runs_nothing(form):
    html = page(FORMS[form]())
    for needle in ("http://", "https://", "<script", "src=", "@import", "url(", "<link", "javascript:"):
        assert needle not in html
    assert html.startswith("<!doctype html>")
    assert not any(key.startswith("on") for _, attributes in Page(html).tags for key in attributes)


@pytest.mark.parametrize("form", FORMS)
def test_every_removal_is_listed_with_its_ratio_and_score(form):
    report = FORMS[form]()
    shown = Page(page(report))
    points = report["steps"][0]["points"]
    for i, point in enumerate(points, 1):
        place = shown.cells.index(f"{i}. {point['unit']}")
        assert shown.cells[place + 1 : place + 3] == [f"{point['ratio']:.2%}", f"{point['score']:.3f}"]
    assert f"All {len(points)} removals" in shown.text
    assert sum(tag == "circle" for tag, _ in shown.tags) == len(points)


def test_the_page_says_what_the_score_is():
    assert "calibration perplexity" in page(REPORT)
    assert "KL to dense" not in page(REPORT)
    assert "KL to dense" in page(_with_kl())
    assert "calibration perplexity" not in page(_with_kl())


def test_the_page_shows_the_table_settings_costs_and_machine():
    shown = Page(page(REPORT))
    for row in table(REPORT):
        place = shown.cells.index(row[0])
        assert tuple(shown.cells[place : place + 3]) == row
    for text in ("models/pico", "20.0% of the parameters removed", "Some CPU, 2 threads", "torch 2.13.0"):
        assert text in shown.text
    assert "ratio=0.2, split=44:52:4" in shown.text
    place = shown.cells.index("mlp channels")
    assert shown.cells[place : place + 6] == ["mlp channels", "1", "30", "10", "1,234", "1m15s"]
    assert "1m35s in all, peak memory 513 MiB" in shown.text


def test_speed_is_shown_beside_the_prediction_only_when_it_was_measured():
    assert "measured" not in Page(page(REPORT)).cells
    shown = Page(page(with_speed()))
    place = shown.cells.index("prefill, from multiply-accumulates")
    assert shown.cells[place + 1 : place + 4] == ["1.27x", "1.20x", "1.08 to 1.32"]
    place = shown.cells.index("decode, from bytes of weights and cache read")
    assert shown.cells[place + 1 : place + 4] == ["1.23x", "1.30x", "1.17 to 1.43"]
    assert "5 rounds: prompt of 256 tokens, 32 decoded, batch 1" in shown.text


def test_a_bar_is_drawn_for_every_axis_of_every_layer_and_filled_by_what_is_kept():
    shown = Page(page(REPORT))
    gone = [a for tag, a in shown.tags if tag == "rect" and a["class"] == "gone"]
    kept = [a for tag, a in shown.tags if tag == "rect" and a["class"] == "kept"]
    assert len(gone) == len(REPORT["layers"])
    assert len(kept) == sum(share > 0 for share in REPORT["layers"].values())
    assert "layer 0, mlp.channels: 75% kept" in shown.text
    assert "layer 2, attention.kv: 0% kept" in shown.text
    full = float(gone[0]["height"])
    assert sum(float(a["height"]) for a in kept) == pytest.approx(full * sum(REPORT["layers"].values()))


def _refitted(before, after):
    return {"block": "layers.0.mlp", "distance": {"before": before, "after": after}}


def test_repair_is_told_and_what_it_left_alone():
    fits = [_refitted(0.5, 0.25), {"block": "layers.1.mlp", "distance": None}, _refitted(0.125, 0.0625)]
    shown = Page(page(REPORT | {"steps": [_shown(STEP | {"repair": fits})]})).text
    assert "Repair: 2 blocks refitted" in shown
    assert "0.125 before it was refitted, 0.0625 after" in shown
    assert "1 block(s) do not end in a single matrix and were not refitted" in shown
    assert "Repair" not in Page(page(REPORT)).text
    nothing = Page(page(REPORT | {"steps": [_shown(STEP | {"repair": fits[1:2]})]})).text
    assert "Repair: 1 block(s)" in nothing


@pytest.mark.parametrize("held_out", [[3.2, 3.0, 3.1], [None, None, None]], ids=["held out", "none held out"])
def test_recovery_is_drawn(held_out):
    curve = [
        {"step": step, "loss": None if step == 0 else 3.0, "held_out": loss, "seconds": 1.0}
        for step, loss in zip((0, 10, 20), held_out, strict=True)
    ]
    recovery = {"curve": curve, "steps": 20, "best_step": 10, "tokens": 40960, "tokens_per_second": 140.4}
    step = {key: value for key, value in STEP.items() if key not in ("points", "counters")} | {"recovery": recovery}
    shown = Page(page(REPORT | {"steps": [_shown(step)]}))
    assert "20 steps, 40,960 tokens at 140 tokens/s; the state of step 10 was kept." in shown.text
    lowest = [a for tag, a in shown.tags if tag == "circle"]
    assert len(lowest) == (3 if held_out[0] else 0)
    assert ("step 10: 3.000" in shown.text) == bool(held_out[0])


def test_a_step_that_recorded_no_removals_has_no_curve():
    step = {key: value for key, value in STEP.items() if key not in ("points", "counters")}
    shown = Page(page(REPORT | {"steps": [_shown(step)]}))
    assert "removals" not in shown.text
    assert not any(tag == "circle" for tag, _ in shown.tags)


def test_every_step_of_a_recipe_has_its_part():
    second = copy.deepcopy(STEP)
    second["settings"] = {"step": "blockpruner", "ratio": 0.1}
    second = _shown(second | {"points": [removal("blocks", "layers.3.mlp", 3.0, 0.25, 20.0)]})
    shown = Page(page(REPORT | {"steps": [STEP, second]}))
    assert "1. layers.3.mlp" in shown.cells
    assert "All 3 removals" in shown.text
    assert "All 1 removals" in shown.text


def test_markup_in_names_is_text():
    evil = "<img src=x onerror=alert(1)>&\"'"
    report = json.loads(json.dumps(REPORT))
    report["model"] = evil
    report["machine"]["cpu"] = evil
    report["steps"][0]["settings"]["split"] = evil
    report["steps"][0]["done"] = evil
    for part in ("before", "after"):
        quality = report[part]["quality"]
        quality["perplexity"] = {evil: quality["perplexity"]["held-out.txt"]}
    html = page(report)
    assert "<img" not in html
    assert html.count(escape(evil)) == 6  # title, heading, headline, machine, setting, table


def test_a_table_of_numbers_is_drawn():
    report = json.loads(json.dumps(REPORT))
    report["steps"][0]["sections"] = [to_dict(Table(["layer", "share"], [[0, 0.5]]))]
    assert "<td>0</td><td>0.5</td>" in page(report)


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")))
def test_any_model_name_leaves_a_whole_page(name):
    shown = Page(page(REPORT | {"model": name}))
    assert name in shown.text
    assert [tag for tag, _ in shown.tags] == [tag for tag, _ in Page(page(REPORT)).tags]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 700)), min_size=1, max_size=12))
def test_every_point_lies_inside_the_picture(pairs):
    points = [removal("blocks", f"layers.{i}.mlp", loss, ratio) for i, (ratio, loss) in enumerate(pairs)]
    shown = Page(page(REPORT | {"steps": [_shown(STEP | {"points": points})]}))
    dots = [a for tag, a in shown.tags if tag == "circle"]
    assert len(dots) == (len(points) if len(points) > 1 else 0)
    assert all(0 <= float(dot["cx"]) <= 640 and 0 <= float(dot["cy"]) <= 260 for dot in dots)
    assert sum(cell.endswith(".mlp") for cell in shown.cells) == len(points)


def test_the_page_says_what_was_packed_and_how_it_runs():
    shown = Page(page(REPORT | {"ratio": 0.0, "steps": [PACKED]})).text
    assert "Linear layers (75.0% of the parameters) packed as int4 and int8. Measured" in shown
    assert (
        "Packed layers at 4.38 bits per weight, run one by one: its norm is Odd<Norm>. Not packed: 25.0% of the "
        "parameters (1.6 MB)" in shown
    )
    both = Page(
        page(REPORT | {"steps": [STEP, _shown(PACKED | {"native": True, "why_not_native": "", "sections": []})]})
    ).text
    assert "20.0% of the parameters removed, linear layers (75.0% of the parameters) packed as int4 and int8." in both
    assert "all run in one native call." in both
