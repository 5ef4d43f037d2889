"""``pliant export --to gguf``: the file, its types, its proof, and what is left after a failure."""

import importlib.util
import types

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pliant
from pico import pico
from pliant.cli.main import app
from pliant.exporters.gguf import export as module
from pliant.exporters.gguf import proof, writer
from pliant.progress import Progress
from pliant.runtime import llama_process
from pliant.runtime.llama_model import LlamaModel

gguf = pytest.importorskip("gguf")
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
WIDE = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 16}


class Lines(Progress):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Logits:
    """A stand-in for llama.cpp that returns given logits."""

    version = "0"

    def __init__(self, logits):
        self.given = logits

    def __call__(self, *_args, **_named):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def logits(self, ids):
        return self.given(torch.tensor([ids]))


@pytest.fixture
def without(monkeypatch):
    """No llama.cpp, so that nothing is proven."""
    for place in (module, proof, llama_process):
        monkeypatch.setattr(place, "why_no_llama_cpp", lambda: "llama-cpp-python is not installed")


@pytest.fixture
def answers(monkeypatch):
    """llama.cpp computes what a function says."""

    def use(function):
        monkeypatch.setattr(proof, "why_no_llama_cpp", str)
        monkeypatch.setattr(proof, "LlamaProcess", Logits(function))

    return use


def read(path):
    reader = gguf.GGUFReader(path)
    return {tensor.name: tensor for tensor in reader.tensors}, reader


def values(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(("kind", "apart"), [("f32", 0), ("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2), ("q4_0", 0.2)])
def test_a_file_of_each_type_holds_the_weights(kind, apart, tmp_path):
    model = pico("llama", **WIDE)
    shown = Lines()
    path = pliant.export(model, tmp_path / "small.gguf", "gguf", type=kind, progress=shown)
    tensors, reader = read(path)
    assert reader.get_field("general.architecture").contents() == "llama"
    for name, weight in {
        "blk.1.ffn_up.weight": model.model.layers[1].mlp.up_proj.weight,
        "token_embd.weight": model.model.embed_tokens.weight,
    }.items():
        found, expected = values(tensors[name]), weight.detach().numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= apart * np.abs(expected).max()
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert any(note.startswith("not proven here") for note in shown.notes)


@pytest.mark.usefixtures("without")
def test_rows_that_no_block_fits_stay_float16(tmp_path):
    model = pico("llama", hidden_size=96, intermediate_size=40, head_dim=16)
    tensors, _ = read(pliant.export(model, tmp_path / "small.gguf", "gguf", type="q4_0"))
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 40
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0" if "output.weight" not in kinds else kinds["output.weight"] == "Q8_0"


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("format", "group", "kind"), [("int4", 32, "q4_0"), ("int4", 64, "q4_0"), ("int8", None, "q8_0")]
)
@pytest.mark.parametrize("sparse", ["never", "always"])
def test_codes_of_a_packed_model_are_written_unchanged(format, group, kind, sparse, tmp_path):
    model = pico("llama", **WIDE)
    settings = {} if group is None else {"group": group}
    pliant.apply(model, pliant.PackedLinear(format=format, sparse=sparse, **settings), progress=False)
    tensors, _ = read(pliant.export(model, tmp_path / "small.gguf", "gguf", type=kind))
    packed = model.model.layers[0].mlp.down_proj
    stored = tensors["blk.0.ffn_down.weight"]
    assert stored.tensor_type.name == kind.upper()
    found, expected = values(stored), packed.dense().weight.detach().numpy()
    if format == "int4":  # bfloat16 scales fit float16
        assert np.array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=0)
        codes = stored.data.view(np.uint8).reshape(len(expected), -1, 34)[..., 2:].view(np.int8)
        assert np.array_equal(
            codes.reshape(expected.shape), np.rint(expected / np.abs(expected).max(1, keepdims=True) * 127)
        )


@pytest.mark.usefixtures("without")
def test_rows_of_packed_queries_are_turned_with_their_scales(tmp_path):
    model = pico("llama", **WIDE)
    pliant.apply(model, pliant.PackedLinear(format="int4", group=32), progress=False)
    tensors, _ = read(pliant.export(model, tmp_path / "small.gguf", "gguf", type="q4_0"))
    weight = model.model.layers[0].self_attn.q_proj.dense().weight.detach()
    heads = weight.view(-1, 2, 8, weight.shape[1])
    assert np.array_equal(values(tensors["blk.0.attn_q.weight"]), heads.transpose(1, 2).reshape(weight.shape).numpy())


@pytest.mark.usefixtures("without")
def test_a_value_that_a_type_cannot_hold_is_refused(tmp_path):
    model = pico("llama", **WIDE)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    with pytest.raises(pliant.PliantError, match=r"blk.1.ffn_up.weight has values that f16 cannot hold"):
        pliant.export(model, tmp_path / "small.gguf", "gguf")
    assert not list(tmp_path.iterdir())
    pliant.export(model, tmp_path / "small.gguf", "gguf", type="bf16")


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("small", {}, "ends in .gguf"),
        ("small.gguf", {"type": "q9"}, "unknown type 'q9'"),
        ("small.gguf", {"type": "q4_k_m"}, "llama-quantize small-f16.gguf small.gguf Q4_K_M"),
        ("small.gguf", {"kind": "q4_0"}, "gguf has no option kind; it has type"),
        ("there/small.gguf", {}, "exists"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(out, options, message, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "small.gguf").write_text("mine")
    with pytest.raises(pliant.PliantError, match=message):
        pliant.export(pico("llama", **WIDE), tmp_path / out, "gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "small.gguf").read_text() == "mine"


@pytest.mark.usefixtures("without")
def test_the_file_that_a_model_came_from_is_not_replaced(tmp_path):
    path = pliant.export(pico("llama", **WIDE), tmp_path / "small.gguf", "gguf", type="f32")
    before = path.read_bytes()
    with pytest.raises(pliant.PliantError, match="is the model itself"):
        pliant.export(path, path, "gguf", overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("without")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = pico("llama", **WIDE)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
        with pytest.raises(pliant.PliantError, match="has 1000 B free, but the file needs"):
            pliant.export(model, tmp_path / "small.gguf", "gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "chunks", full)
    with pytest.raises(pliant.PliantError, match=r"cannot write .*No space left on device"):
        pliant.export(model, tmp_path / "small.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_from_which_llama_cpp_computes_something_else_is_not_kept(tmp_path, answers):
    model = pico("llama", **WIDE)

    def ours(ids):
        with torch.inference_mode():
            return model(input_ids=ids).logits[0].numpy()

    shown = Lines()
    answers(ours)
    pliant.export(model, tmp_path / "small.gguf", "gguf", progress=shown)
    assert any("differ by 0.0e+00 of their norm, 100.0%" in note for note in shown.notes)
    (tmp_path / "small.gguf").unlink()
    (tmp_path / "Modelfile").unlink()
    answers(lambda ids: ours(ids)[::-1].copy())
    with pytest.raises(pliant.PliantError, match=r"llama.cpp 0 computes something else"):
        pliant.export(model, tmp_path / "small.gguf", "gguf", type="q4_0")
    answers(lambda ids: np.full_like(ours(ids), np.nan))
    with pytest.raises(pliant.PliantError, match=r"llama.cpp 0 computes something else"):
        pliant.export(model, tmp_path / "small.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without")
def test_a_modelfile_of_the_users_stays(tmp_path):
    (tmp_path / "Modelfile").write_text("FROM mine")
    shown = Lines()
    model = pico("llama", **WIDE)
    pliant.export(model, tmp_path / "small.gguf", "gguf", progress=shown)
    assert (tmp_path / "Modelfile").read_text() == "FROM mine"
    assert any("exists and stays as it is" in note for note in shown.notes)
    pliant.export(model, tmp_path / "small.gguf", "gguf", overwrite=True)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./small.gguf\n")


@pytest.mark.usefixtures("without")
def test_the_command_line_writes_a_file(tmp_path):
    pliant.save(pico("llama", **WIDE), tmp_path / "model")
    out = tmp_path / "small.gguf"
    command = ["export", str(tmp_path / "model"), "--to", "gguf", "--type", "q8_0", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output.replace("\n", "")
    assert read(out)[1].get_field("general.file_type").contents() == 7
    result = CliRunner().invoke(app, [*command[:2], "--type", "q8_0", "--out", str(tmp_path / "plain")])
    assert result.exit_code
    assert str(result.exception) == "homogeneous has no option type; leave it out"


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtime": "vllm"}, "unknown runtime 'vllm'"),
        ({"dtype": "float32"}, "leave out dtype"),
        ({"memory": "1GB"}, "leave out memory"),
        ({"revision": "x"}, "leave out revision"),
        ({}, "llama-cpp-python is not installed"),
    ],
)
def test_llama_cpp_as_a_runtime_refuses_what_it_does_not_do(given, message, tmp_path):
    path = pliant.export(pico("llama", **WIDE), tmp_path / "small.gguf", "gguf")
    with pytest.raises(pliant.PliantError, match=message):
        pliant.load(path, **{"runtime": "llama.cpp", **given})
    with pytest.raises(pliant.PliantError, match=r"opens \.gguf files"):
        pliant.load(tmp_path, runtime="llama.cpp")


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python is not installed")
def test_llama_cpp_computes_what_the_model_does(tmp_path):
    model = pico("llama", **WIDE)
    shown = Lines()
    pliant.apply(model, pliant.Cut(subnet=pliant.Subnet().without("layers.0.mlp")), progress=False)
    path = pliant.export(model, tmp_path / "small.gguf", "gguf", type="f32", progress=shown)
    assert any(note.startswith("proven in llama.cpp") for note in shown.notes)
    opened = LlamaModel(path, cache="f32")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        ours = model(input_ids=ids).logits
    assert (opened(input_ids=ids).logits - ours).norm() / ours.norm() < 1e-4
    found = pliant.bench(opened, opened, prompt=8, tokens=4, repeats=2)
    assert found["model"]["decode"]["median"] > 0
    assert found["on"]["model"]["runtime"].startswith("llama.cpp")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(pliant.PliantError, match=r"llama\.cpp cannot open"):
        pliant.load(path, runtime="llama.cpp")
