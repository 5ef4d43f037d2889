"""What the documentation shows works."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pliant
from pico import IDS, logits, tokenizer
from pliant.architecture import known_families
from pliant.errors import ArchitectureError

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text("utf-8")
TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(known_families, "_added", {})
    path = tmp_path / "glm.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", PAGE, flags=re.S)[1])
    return path


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "glm", vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_stranger_is_refused_with_the_reason_that_the_page_shows(model):
    with pytest.raises(ArchitectureError) as refusal:
        pliant.discover(model)
    shown = re.search(r"pliant: (.*?) …", PAGE, flags=re.S)[1]
    assert " ".join(shown.split()) in str(refusal.value)


@pytest.mark.slow
def test_one_data_file_adds_it(model, file, tmp_path):
    pliant.add_architecture(file)
    pliant.check(model)
    step = pliant.MultiPruner(ratio=0.25, samples=8, width_samples=8, seqlen=32, mlp_group=8)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    kinds = {name.rpartition(".")[2] for name in model.pliant_history[0]["subnet"]["keep"]}
    assert "channels" in kinds
    model.save_pretrained(tmp_path / "small")
    torch.save(logits(model), tmp_path / "logits.pt")
    program = (  # another process, in which nobody added the file
        "import pliant, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'small')!r}).eval()\n"
        f"with torch.inference_mode(): found = model(torch.tensor({IDS.tolist()}), use_cache=False).logits\n"
        f"assert torch.allclose(found, torch.load({str(tmp_path / 'logits.pt')!r}), atol=1e-5)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_a_wrong_file_is_told_where_it_is_wrong(model, file):
    text = file.read_text()
    file.write_text(text.replace("q_proj: [heads,", "q_proj: [kv,").replace("k_proj: [kv,", "k_proj: [heads,"))
    pliant.add_architecture(file)
    with pytest.raises(ArchitectureError, match=r"[qk]_proj"):
        pliant.check(model)


def test_any_module_is_packed_as_the_page_shows(capsys):
    page = (Path(__file__).parent.parent / "docs" / "runtime.md").read_text("utf-8")
    shown = re.search(r"## Any module\n.*?```python\n(.*?)```", page, flags=re.S)[1]
    exec(shown.replace("int8", "bf16"), {"pliant": pliant})
    assert "parameters of MultiheadAttention outside linear layers" in capsys.readouterr().out


FORBIDDEN = re.compile(
    r"\btold\b|\b[Tt]here is no |\bis no (?!longer\b)|(^ *|[.!?:;] )What (?![^.!?]*\?)", re.MULTILINE
)


def _texts(path: Path):
    """Line and text of every docstring and string literal in a file; the parts of an f-string are joined by ``{}``."""
    tree = ast.parse(path.read_text("utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def test_messages_and_docstrings_have_none_of_the_phrases_that_the_style_page_forbids():
    root = Path(pliant.__file__).parent
    faults = []
    for path in sorted(root.rglob("*.py")):
        for line, text in _texts(path):
            plain = re.sub(r"(?<!\n)\n[ ]*(?!\n)", " ", text)  # a sentence may be wrapped
            faults += [f"{path.relative_to(root)}:{line}: {match[0].strip()}" for match in FORBIDDEN.finditer(plain)]
    assert not faults, "\n".join(faults)
