import copy
import json
import re
from html import escape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.run.card import card, changed, table, versions
from pliant.run.report import page


def _point(stage, unit, loss, ratio, perplexity=None):
    return {
        "stage": stage,
        "unit": unit,
        "loss": loss,
        "perplexity": perplexity,
        "ratio": ratio,
        "parameters": 1000,
        "macs": 900,
    }


def _quality(perplexity, acc):
    row = {"perplexity": perplexity, "loss": 2.5, "stderr": 0.1, "windows": 8, "seqlen": 64}
    task = {"acc": acc, "acc_norm": acc + 0.01, "stderr": 0.02, "questions": 50}
    return {"perplexity": {"held-out.txt": row}, "tasks": {"arc": task}}


def _costs(parameters, quality):
    return {
        "parameters": parameters,
        "macs_per_token": parameters,
        "weight_bytes": 4 * parameters,
        "streamed_bytes": 4 * parameters,
        "cache_bytes_per_token": parameters // 100,
        "quality": quality,
    }


def _counters(steps):
    return {
        "steps": steps,
        "scores": 40,
        "evaluations": 30,
        "replayed": 10,
        "block_forwards": 1234.0,
        "seconds": 75.0,
        "windows": [8, 64],
    }


STEP = {
    "settings": {"step": "multipruner", "ratio": 0.2, "split": "44:52:4", "mlp_group": None},
    "data": {"source": "prose.txt", "rows": 200, "hash": "abc"},
    "parameters_before": 2_000_000,
    "parameters_after": 1_600_000,
    "seconds": 95.2,
    "peak_memory": 538060032,
    "points": [
        _point("blocks", "layers.2.attention", 2.6, 0.08, 13.463),
        _point("blocks", "layers.1.mlp", 2.7, 0.15, 14.879),
        _point("mlp channels", "layers.0.mlp.channels", 2.8, 0.2, 16.444),
    ],
    "counters": {"blocks": _counters(2), "mlp channels": _counters(1)},
}

PACKED = {
    "settings": {"step": "packed", "format": "int4"},
    "data": None,
    "parameters_before": 1_600_000,
    "parameters_after": 1_600_000,
    "seconds": 0.4,
    "peak_memory": 538060032,
    "packed": {"lm_head": {"format": "int8"}, "layers.0.up": {"format": "int4"}, "layers.0.down": {"format": "int4"}},
    "bits": 4.375,
    "native": False,
    "why_not_native": "its norm is Odd<Norm>",
}

REPORT = {
    "schema": 1,
    "model": "models/pico",
    "ratio": 0.2,
    "before": _costs(2_000_000, _quality(12.5, 0.5)),
    "after": _costs(1_600_000, _quality(16.789, 0.44)),
    "layers": {
        f"layers.{layer}.{kind}": kept
        for layer, attention, mlp in [(0, 1.0, 0.75), (1, 1.0, 0.0), (2, 0.0, 1.0), (3, 1.0, 1.0)]
        for kind, kept in [("attention.kv", attention), ("mlp.channels", mlp)]
    },
    "steps": [STEP],
    "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "system": "Linux"},
    "versions": {"pliant": "0.1.0", "torch": "2.13.0"},
}


def _rate(median):
    return {"median": median, "p10": median * 0.9, "p90": median * 1.1}


def _with_speed():
    return REPORT | {
        "speed": {
            "model": {"prefill": _rate(240.0), "decode": _rate(52.0)},
            "against": {"prefill": _rate(200.0), "decode": _rate(40.0)},
            "speedup": {"prefill": _rate(1.2), "decode": _rate(1.3)},
            "settings": {"prompt": 256, "tokens": 32, "batch": 1, "repeats": 5},
            "threads": 2,
            "peak_memory": 538060032,
        },
        "predicted": {"prefill": 1.27, "decode": 1.23},
    }


def _with_kl():
    report = copy.deepcopy(REPORT)
    report["steps"][0]["settings"]["metric"] = "kl"
    for point, loss in zip(report["steps"][0]["points"], (0.0111, 0.0222, 0.0333), strict=True):
        point |= {"perplexity": None, "loss": loss}
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


FORMS = {"plain": lambda: REPORT, "speed": _with_speed, "kl": _with_kl}


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
        value = point["loss"] if form == "kl" else point["perplexity"]
        assert shown.cells[place + 1 : place + 3] == [f"{point['ratio']:.2%}", f"{value:.3f}"]
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
    shown = Page(page(_with_speed()))
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
    shown = Page(page(REPORT | {"steps": [STEP | {"repair": fits}]})).text
    assert "Repair: 2 blocks refitted" in shown
    assert "0.125 before it was refitted, 0.0625 after" in shown
    assert "1 block(s), which something else than a matrix ends" in shown
    assert "Repair" not in Page(page(REPORT)).text
    nothing = Page(page(REPORT | {"steps": [STEP | {"repair": fits[1:2]}]})).text
    assert "Repair: 1 block(s)" in nothing


@pytest.mark.parametrize("held_out", [[3.2, 3.0, 3.1], [None, None, None]], ids=["held out", "none held out"])
def test_recovery_is_drawn(held_out):
    curve = [
        {"step": step, "loss": None if step == 0 else 3.0, "held_out": loss, "seconds": 1.0}
        for step, loss in zip((0, 10, 20), held_out, strict=True)
    ]
    recovery = {"curve": curve, "steps": 20, "best_step": 10, "tokens": 40960, "tokens_per_second": 140.4}
    step = {key: value for key, value in STEP.items() if key not in ("points", "counters")} | {"recovery": recovery}
    shown = Page(page(REPORT | {"steps": [step]}))
    assert "20 steps, 40,960 tokens at 140 tokens/s; the state of step 10 was kept." in shown.text
    lowest = [a for tag, a in shown.tags if tag == "circle"]
    assert len(lowest) == (3 if held_out[0] else 0)
    assert ("step 10: 3.000" in shown.text) == bool(held_out[0])


def test_a_step_that_recorded_no_removals_has_no_curve():
    step = {key: value for key, value in STEP.items() if key not in ("points", "counters")}
    shown = Page(page(REPORT | {"steps": [step]}))
    assert "removals" not in shown.text
    assert not any(tag == "circle" for tag, _ in shown.tags)


def test_every_step_of_a_recipe_has_its_part():
    second = copy.deepcopy(STEP)
    second["settings"] = {"step": "blockpruner", "ratio": 0.1}
    second["points"] = [_point("blocks", "layers.3.mlp", 3.0, 0.25, 20.0)]
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
    for part in ("before", "after"):
        quality = report[part]["quality"]
        quality["perplexity"] = {evil: quality["perplexity"]["held-out.txt"]}
    html = page(report)
    assert "<img" not in html
    assert html.count(escape(evil)) == 5  # title, heading, machine, setting, table


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")))
def test_any_model_name_leaves_a_whole_page(name):
    shown = Page(page(REPORT | {"model": name}))
    assert name in shown.text
    assert [tag for tag, _ in shown.tags] == [tag for tag, _ in Page(page(REPORT)).tags]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 700)), min_size=1, max_size=12))
def test_every_point_lies_inside_the_picture(pairs):
    points = [_point("blocks", f"layers.{i}.mlp", loss, ratio) for i, (ratio, loss) in enumerate(pairs)]
    shown = Page(page(REPORT | {"steps": [STEP | {"points": points}]}))
    dots = [a for tag, a in shown.tags if tag == "circle"]
    assert len(dots) == (len(points) if len(points) > 1 else 0)
    assert all(0 <= float(dot["cx"]) <= 640 and 0 <= float(dot["cy"]) <= 260 for dot in dots)
    assert sum(cell.endswith(".mlp") for cell in shown.cells) == len(points)


def test_the_table_sets_before_against_after():
    assert table(REPORT) == [
        ("parameters", "2,000,000", "1,600,000 (-20.0%)"),
        ("weights", "8.0 MB", "6.4 MB"),
        ("KV cache per token", "20,000 B", "16,000 B"),
        ("perplexity, held-out.txt", "12.50", "16.79"),
        ("arc acc", "50.0%", "44.0%"),
        ("arc acc_norm", "51.0%", "45.0%"),
    ]
    assert table(_with_speed())[-2:] == [
        ("prefill, tokens/s", "200.0", "240.0 (1.20x)"),
        ("decode, tokens/s", "40.0", "52.0 (1.30x)"),
    ]


def test_the_table_has_one_row_for_a_task_of_open_questions():
    quality = {"perplexity": {}, "tasks": {"sums": {"match": 0.25, "stderr": 0.05, "questions": 80}}}
    report = REPORT | {"before": _costs(2_000_000, quality), "after": _costs(1_600_000, quality)}
    assert table(report)[3:] == [("sums match", "25.0%", "25.0%")]


def test_the_table_does_without_quality():
    report = REPORT | {"before": _costs(2_000_000, {}), "after": _costs(1_600_000, {})}
    assert [name for name, _, _ in table(report)] == ["parameters", "weights", "KV cache per token"]


def _card(name="models/pico", history=(STEP,), report=REPORT):
    return card(SimpleNamespace(name_or_path=name), list(history), report)


def test_the_card_says_what_was_done_what_it_cost_and_how_to_load_it():
    shown = _card()
    assert "# pico, compressed by pliant" in shown
    assert "- multipruner (ratio=0.2, split=44:52:4" in shown
    assert "2,000,000 to 1,600,000 parameters in 95 s" in shown
    for row in table(REPORT):
        assert f"| {' | '.join(row)} |" in shown
    assert "Measured on Some CPU, 2 threads." in shown
    code = re.search(r"```python\n(.*?)```", shown, re.S)[1]
    compile(code, "card", "exec")
    assert code.startswith("import pliant")


def test_a_packed_model_is_not_said_to_be_cut():
    report = REPORT | {"ratio": 0.0, "steps": [PACKED]}
    words = "Layers of 4.38 bits a weight, run one by one: its norm is Odd<Norm>."
    shown = _card(history=(PACKED,), report=report)
    assert "tags:\n- pliant\n- quantized\n---" in shown
    assert f"parameters in 0 s. {words}" in shown
    assert "%" not in table(report)[0][2]
    page_shown = Page(page(report))
    assert "Linear layers packed as int4 and int8. Measured" in page_shown.text
    assert words in page_shown.text
    both = REPORT | {"steps": [STEP, PACKED | {"native": True, "why_not_native": ""}]}
    assert "tags:\n- pliant\n- pruned\n- quantized\n---" in _card(history=both["steps"], report=both)
    assert "20.0% of the parameters removed, linear layers packed as int4 and int8." in Page(page(both)).text
    assert "all of them run in one native call." in Page(page(both)).text


def test_a_report_says_when_nothing_was_removed_or_packed():
    assert changed(REPORT | {"ratio": 0.0}) == "no parameters removed"


def test_the_card_does_without_a_report():
    shown = _card(report=None)
    assert "before" not in shown
    assert "Measured" not in shown
    assert "## Load it" in shown


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=150))
def test_the_metadata_of_the_card_is_yaml_whatever_the_name(name):
    _, metadata, _ = re.split(r"^---$", _card(name), maxsplit=2, flags=re.M)
    assert yaml.safe_load(metadata) == {
        "base_model": name,
        "library_name": "transformers",
        "tags": ["pliant", "pruned"],
    }


@pytest.mark.parametrize("name", ["models/pico/", "models/pico", "pico"])
def test_the_card_is_titled_by_the_last_part_of_the_name(name):
    assert "# pico, compressed by pliant" in _card(name)


def test_a_bar_in_a_name_does_not_add_a_column_to_the_card():
    report = json.loads(json.dumps(REPORT))
    for part in ("before", "after"):
        report[part]["quality"]["tasks"] = {"a|b": report[part]["quality"]["tasks"]["arc"]}
    rows = [line for line in _card(report=report).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table(report))
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_versions_are_those_installed():
    import torch
    import transformers

    found = versions()["versions"]
    assert found["torch"] == str(torch.__version__)
    assert found["transformers"] == transformers.__version__
    assert set(found) == {"pliant", "torch", "transformers", "python"}
