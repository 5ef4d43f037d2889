import json

import pytest

from pico import pico
from pliant.errors import ArtefactError
from pliant.progress import Progress
from pliant.run.demo import PROMPTS, fetch, run


@pytest.fixture
def parts(tmp_path, prose, tokenizer):
    """The demo's folder with everything fetched already, but tiny."""
    place = tmp_path / "parts"
    pico("llama", max_position_embeddings=512).save_pretrained(place / "smollm2-135m")
    tokenizer.save_pretrained(place / "smollm2-135m")
    rows = [json.dumps({"text": row}) for row in prose.read_text().split("\n\n")]
    (place / "calibration.jsonl").write_text("\n".join(rows[:150]))
    (place / "held-out.jsonl").write_text("\n".join(rows[150:]))
    return tmp_path


@pytest.mark.slow
def test_a_second_demo_finds_the_work_of_the_first(parts):
    first = run(parts, Progress())
    weights = (parts / "small" / "model.safetensors").stat().st_mtime_ns
    second = run(parts, Progress())
    assert [step["settings"]["step"] for step in first["steps"]] == ["fisher", "packed"]
    assert len(first["before"]["quality"]["perplexity"]) == 2
    assert [reply["prompt"] for reply in first["replies"]] == list(PROMPTS)
    assert second == first
    assert (parts / "small" / "model.safetensors").stat().st_mtime_ns == weights
    assert first["ratio"] >= 0.1
    assert (parts / "small" / "report.html").exists()


def test_what_pip_cannot_fetch_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ArtefactError, match="pip could not fetch"):
        fetch(tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.jsonl"))
