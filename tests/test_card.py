"""The model card and the before/after table."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.record import Note, to_dict
from pliant.run.card import card, changed, table, versions
from reported import PACKED, REPORT, STEP, costs, with_speed


def test_the_table_sets_before_against_after():
    assert table(REPORT) == [
        ("parameters", "2,000,000", "1,600,000 (-20.0%)"),
        ("weights", "8.0 MB", "6.4 MB"),
        ("KV cache per token", "20,000 B", "16,000 B"),
        ("perplexity, held-out.txt", "12.50", "16.79"),
        ("arc acc", "50.0%", "44.0%"),
        ("arc acc_norm", "51.0%", "45.0%"),
    ]
    assert table(with_speed())[-2:] == [
        ("prefill, tokens/s", "200.0", "240.0 (1.20x)"),
        ("decode, tokens/s", "40.0", "52.0 (1.30x)"),
    ]


def test_the_table_has_one_row_for_a_task_of_open_questions():
    quality = {"perplexity": {}, "tasks": {"sums": {"match": 0.25, "stderr": 0.05, "questions": 80}}}
    report = REPORT | {"before": costs(2_000_000, quality), "after": costs(1_600_000, quality)}
    assert table(report)[3:] == [("sums match", "25.0%", "25.0%")]


def test_the_table_does_without_quality():
    report = REPORT | {"before": costs(2_000_000, {}), "after": costs(1_600_000, {})}
    assert [name for name, _, _ in table(report)] == ["parameters", "weights", "KV cache per token"]


def test_the_table_shows_states_of_a_fixed_size():
    before, after = costs(2_000_000, {}) | {"state_bytes": 8192}, costs(1_600_000, {}) | {"state_bytes": 4096}
    assert ("state of a sequence", "8,192 B", "4,096 B") in table(REPORT | {"before": before, "after": after})


def _card(name="models/pico", history=(STEP,), report=REPORT):
    return card(SimpleNamespace(name_or_path=name), list(history), report)


def test_the_card_says_what_was_done_what_it_cost_and_how_to_load_it():
    shown = _card()
    assert "# pico, compressed by pliant" in shown
    assert "- multipruner (ratio=0.2, split=44:52:4" in shown
    assert "2,000,000 to 1,600,000 parameters in 95 s" in shown
    for row in table(REPORT):
        assert f"| {' | '.join(row)} |" in shown
    assert "Measured on Some CPU, 2 threads, in float32." in shown
    code = re.search(r"```python\n(.*?)```", shown, re.S)[1]
    compile(code, "card", "exec")
    assert code.startswith("import pliant")


def test_a_packed_model_is_not_said_to_be_cut():
    report = REPORT | {"ratio": 0.0, "steps": [PACKED]}
    shown = _card(history=(PACKED,), report=report)
    assert "tags:\n- pliant\n- quantized\n---" in shown
    assert (
        "parameters in 0 s. Packed layers at 4.38 bits per weight, run one by one: its norm is Odd&lt;Norm&gt;. "
        in shown
    )
    assert "Not packed: 25.0% of the parameters (1.6 MB), of which 24.9% embeddings." in shown
    assert "%" not in table(report)[0][2]
    assert changed(report) == "linear layers (75.0% of the parameters) packed as int4 and int8"
    assert "tags:\n- pliant\n- pruned\n- quantized\n---" in _card(history=(STEP, PACKED))


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


def test_markup_in_a_note_or_a_setting_is_text():
    history = json.loads(json.dumps(REPORT["steps"]))
    history[0]["settings"]["split"] = "<b>\n# heading"
    history[0]["sections"] = [to_dict(Note("<script>\n\n# heading\n---"))]
    card = _card(history=history)
    assert "<b>" not in card
    assert "<script>" not in card
    assert "\n# heading" not in card


def test_versions_are_those_installed():
    import torch
    import transformers

    found = versions()["versions"]
    assert found["torch"] == str(torch.__version__)
    assert found["transformers"] == transformers.__version__
    assert set(found) == {"pliant", "torch", "transformers", "python"}
