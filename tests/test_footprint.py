"""Disk space and memory of a model, and its replies to prompts."""

import sys

import pytest

import pliant
from pico import pico
from pliant.errors import ArchitectureError, DataError
from pliant.measure.memory import disk_bytes, run_memory
from pliant.measure.quality.replies import replies
from pliant.progress import Progress
from pliant.run.compress import compress
from pliant.run.recipe import Measuring


def test_bytes_on_the_disk_are_those_of_weight_files(folder):
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert disk_bytes(folder) == sum(sizes) > 0
    assert disk_bytes(folder / "nowhere") is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_larger_model_takes_more_memory(tmp_path):
    sizes = []
    for width in (256, 4096):
        model = pico("llama", intermediate_size=width, hidden_size=768, head_dim=128)
        model.save_pretrained(tmp_path / str(width))
        sizes.append((run_memory(tmp_path / str(width)), sum(p.nbytes for p in model.parameters())))
    (small, fewer), (large, more) = sizes
    assert 0.8 * (more - fewer) < large - small < 3 * (more - fewer)
    assert run_memory(tmp_path) is None  # no model


def test_replies_end_before_the_positions_do(model, tokenizer):
    found = replies(model, tokenizer, ["a b c", "d"], tokens=5)
    assert len(found) == 2
    assert found == replies(model, tokenizer, ["a b c", "d"], tokens=5)
    with pytest.raises(DataError, match="a prompt has 256 tokens, but the model has 256 positions"):
        replies(model, tokenizer, ["x" * 256])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    try:
        assert replies(model, tokenizer, ["a b c"], tokens=5) != found[:1]
    finally:
        tokenizer.chat_template = None


@pytest.mark.slow
def test_a_report_shows_replies_and_what_running_takes(folder, prose, tmp_path):
    report = compress(
        folder,
        pliant.ChannelPruner(ratio=0.1),
        prose,
        tmp_path / "small",
        measuring=Measuring(seqlen=32, windows=2, prompts=["river | runs"]),
        progress=Progress(),
    )
    (reply,) = report["replies"]
    assert reply["prompt"] == "river | runs"
    assert reply["before"] != reply["after"]
    assert 0 < report["after"]["disk_bytes"] < report["before"]["disk_bytes"]
    assert report["after"]["disk_bytes"] == disk_bytes(tmp_path / "small")
    assert report["after"]["run_memory"] > 0
    page = (tmp_path / "small" / "report.html").read_text("utf-8")
    assert "<h2>Replies</h2>" in page
    assert page.index("memory to run") < page.index("<h2>Replies</h2>") < page.index("Kept shares")
    assert "| on disk |" in (tmp_path / "small" / "README.md").read_text("utf-8")


def test_what_replies_nothing_is_refused_before_the_work(tmp_path):
    pico("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(ArchitectureError, match="causal language model"):
        compress(
            tmp_path / "vit",
            pliant.ChannelPruner(ratio=0.1),
            None,
            tmp_path / "out",
            measuring=Measuring(prompts=["hello"]),
            progress=Progress(),
        )
