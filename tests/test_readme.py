"""README.md: its code and its commands run as they are written, and its tables are true."""

import copy
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import convnets
import pico
import pliant
from pliant.anatomy import anatomy_of
from pliant.cli.main import app
from pliant.elastic import Subnet
from pliant.errors import PliantError
from pliant.registry import STEPS
from pliant.step import step_class
from test_steps import SETTINGS, TEXT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("pliant ")]

_spec = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "generate.py")
assert _spec is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.fixture
def here(tmp_path, monkeypatch, folder, prose):
    """A folder that has the files that README.md names."""
    place = tmp_path / "here"
    (place / "path" / "or").mkdir(parents=True)
    folder.rename(place / "path" / "or" / "hub-id")
    for name in ("notes.txt", "heldout.txt"):
        (place / name).write_text(prose.read_text("utf-8"), "utf-8")
    question = {"question": "What turns the wheel?", "choices": {"text": ["river", "birds"], "label": ["A", "B"]}}
    (place / "arc_easy.jsonl").write_text(json.dumps({**question, "answerKey": "A"}) + "\n", "utf-8")
    monkeypatch.chdir(place)
    return place


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_ten_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names = {}
    exec(code, names)
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "arc_easy" in out
    assert sum(weight.numel() for weight in names["small"].parameters()) < 0.8 * sum(
        weight.numel() for weight in pliant.load("path/or/hub-id").parameters()
    )
    assert torch.equal(pico.logits(names["model"].eval()), pico.logits(names["small"].eval()))


@pytest.mark.slow
def test_the_commands_run(here):
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"inspect", "compress", "evaluate", "bench", "generate"}
    for line in COMMANDS:
        words = shlex.split(line, comments=True)[1:]
        outcome = CliRunner(env={"NO_COLOR": "1"}).invoke(app, words, catch_exceptions=False)
        assert outcome.exit_code == 0, f"{line}\n{outcome.output}"
    report = json.loads((here / "small" / "report.json").read_text("utf-8"))
    assert report["after"]["parameters"] < 0.8 * report["before"]["parameters"]
    weights = [(here / name / "model.safetensors").read_bytes() for name in ("small", "again")]
    assert weights[0] == weights[1]


def test_the_tables_are_what_the_script_writes():
    assert generate.readme(README) == README, "run make generate"


def test_every_family_is_of_one_kind():
    encoders = {*pico.ENCODERS, "xlm-roberta", "camembert"}
    known = generate.shipped()
    assert {name for name, of in known.items() if generate.kind_of(of) == generate.ENCODERS} == encoders
    assert {name for name, of in known.items() if generate.kind_of(of) == generate.HYBRIDS} == {
        *("lfm2", "mamba", "falcon_mamba", "mamba2", "bamba", "zamba2"),
        *("falcon_h1", "qwen3_5_text", "olmo_hybrid"),
    }
    assert set(known) == {*pico.ARCHITECTURES, *pico.FAMILIES, *pico.OTHERWISE}


MODELS = {"resnet_basic": generate.CONVOLUTIONAL, "llama": generate.DECODERS, "mixtral": generate.EXPERTS}
MODELS |= {"bert": generate.ENCODERS, **dict.fromkeys(("lfm2", "mamba", "nemotron_h"), generate.HYBRIDS)}


def applied(kind, model):
    """Apply a step to a model of any kind, with settings that fit it."""
    settings = dict(SETTINGS[kind])
    if kind == "cut":
        anatomy = anatomy_of(model)
        axis = next(axis for axis in anatomy.axes.values() if axis.size > 1 and axis.allows(axis.size - 1))
        settings["subnet"] = Subnet().keeping(axis.name, axis.size - 1)
    if "ratio" in settings:
        settings["ratio"] = 0.02
    return pliant.apply(model, step_class(kind)(**settings), TEXT, tokenizer=pico.tokenizer(), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_a_cell_says_what_happens(step, name):
    kind = MODELS[name]
    cell = generate.works(step_class(step), kind)
    model = convnets.net(name) if kind == generate.CONVOLUTIONAL else pico.pico(name)
    before = copy.deepcopy(model.state_dict())
    if cell == generate.NO:
        with pytest.raises(PliantError, match="causal language model"):
            applied(step, model)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        return
    applied(step, model)
    after = model.state_dict()
    changed = {name for name in before if name not in after or not torch.equal(after[name], before[name])}
    assert changed
    left = {name for kind in model.pliant_history[0].get("left", {"reasons": []})["reasons"] for name in kind["names"]}
    if cell == generate.WEIGHTS and name == "mamba" and pico.SCANS:
        model = pico.pico(name)
        pliant.apply(model, pliant.Recover(steps=2, seqlen=24), TEXT, tokenizer=pico.tokenizer(), progress=False)
        adapted = {part.split(".")[-2] for part, value in model.state_dict().items() if not value.equal(before[part])}
        assert adapted == {"in_proj", "x_proj"}
    if cell == generate.LINEAR:
        assert {name.rpartition(".")[0] for name in changed} == {"classifier.1"}
    if cell == generate.DENSE:
        assert any("experts" in name for name in left)
        assert all(after[name].shape == before[name].shape for name in before if "experts" in name)


@pytest.mark.slow
def test_the_tools_that_open_a_result(tmp_path):
    for step in STEPS:
        model = applied(step, pico.pico("llama"))
        model.save_pretrained(tmp_path / step)
        torch.save(pico.logits(model), tmp_path / step / "logits.pt")
    program = (  # in a process without pliant
        "import json, pathlib, torch, transformers\n"
        "opened = {}\n"
        f"for folder in pathlib.Path({str(tmp_path)!r}).iterdir():\n"
        "    expected = torch.load(folder / 'logits.pt')\n"
        "    try:\n"
        "        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()\n"
        "    except Exception:\n"
        "        opened[folder.name] = False\n"
        "        continue\n"
        "    with torch.inference_mode():\n"
        f"        found = model(torch.tensor({pico.IDS.tolist()}), use_cache=False).logits\n"
        "    opened[folder.name] = torch.allclose(found, expected, atol=1e-5)\n"
        "print(json.dumps(opened))\n"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    alone = json.loads(outcome.stdout.splitlines()[-1])
    assert alone == {step: generate.opens(step_class(step)) == generate.AS_BEFORE for step in STEPS}
    for step in STEPS:
        again = pico.head_of("llama").from_pretrained(tmp_path / step).eval()
        assert torch.allclose(pico.logits(again), torch.load(tmp_path / step / "logits.pt"), atol=1e-5)
