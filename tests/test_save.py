"""Saving replaces only earlier results, copies the companion files, and refuses unsavable models before any work."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pliant
from pico import config, logits, pico
from pliant.checkpoint.folder import companions
from pliant.cli import main
from pliant.compat.hub_revision import revision_of
from pliant.errors import ArtefactError
from pliant.progress import Progress
from pliant.run import compress as runs
from pliant.run import target as targets
from pliant.run.compress import compress
from pliant.run.demo import run as demo
from pliant.run.recipe import Measuring
from pliant.run.target import check_target, clear_leftovers, files_in

HALF = pliant.ChannelPruner(ratio=0.1)


def contents(folder):
    """Every file and link below a folder, with what is in it."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# ----------------------------------------------------------------------------------------------------------------
# replacing


def by_save(source, out, **_):
    pliant.save(pliant.load(source), out, overwrite=True)


def by_compress(source, out, **_):
    compress(source, HALF, None, out, overwrite=True, measuring=Measuring(speed=False), progress=Progress())


def by_command(source, out, monkeypatch, capsys):
    words = [
        "compress",
        source,
        "--out",
        out,
        "--overwrite",
        "--system",
        "channelpruner",
        "--set",
        "ratio=0.1",
        "--no-speed",
    ]
    ended(words, monkeypatch, capsys)


def by_export(source, out, monkeypatch, capsys):
    ended(["export", source, "--out", out, "--overwrite"], monkeypatch, capsys)


def ended(words, monkeypatch, capsys):
    """The command line's refusal as the error that it is."""
    monkeypatch.setattr(sys, "argv", ["pliant", *map(str, words)])
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise ArtefactError(capsys.readouterr().err) from None


WAYS = {"save": by_save, "compress": by_compress, "command line": by_command, "export": by_export}


def models(out, source):
    shutil.copytree(source, out / "llama")
    (out / "thesis.txt").write_text("ten years of work")


def model_of_another_tool(out, source):
    shutil.copytree(source, out, dirs_exist_ok=True)


def result_with_notes(out, source):
    pliant.save(pliant.load(source), out)
    (out / "notes.txt").write_text("mine")


def result_with_a_folder(out, source):
    pliant.save(pliant.load(source), out)
    (out / "runs" / "empty").mkdir(parents=True)


def result_with_a_link(out, source):
    pliant.save(pliant.load(source), out)
    (out / "data").symlink_to(source)


def result_with_a_repository(out, source):
    pliant.save(pliant.load(source), out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")


def something_with_a_recipe(out, _):
    (out / "recipe.yaml").write_text("flour: 500 g\n")
    (out / "cake.txt").write_text("mix")


FOREIGN = {
    "other models": (models, "is not an earlier result.*llama/config.json"),
    "a model of another tool": (model_of_another_tool, "is not an earlier result"),
    "a result and a file": (
        result_with_notes,
        "holds files that are not part of the earlier result.*: notes.txt; move them away",
    ),
    "a result and a folder": (
        result_with_a_folder,
        "holds files that are not part of the earlier result.*: runs/empty",
    ),
    "a result and a link": (result_with_a_link, "holds files that are not part of the earlier result.*: data"),
    "a result and a repository": (
        result_with_a_repository,
        r"holds files that are not part of the earlier result.*: \.git/HEAD",
    ),
    "a recipe of something else": (something_with_a_recipe, "is not an earlier result.*cake.txt"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_a_result_is_never_replaced(kind, way, folder, tmp_path, monkeypatch, capsys):
    fill, said = FOREIGN[kind]
    out = tmp_path / "out"
    out.mkdir()
    fill(out, folder)
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match=said):
        WAYS[way](folder, out, monkeypatch=monkeypatch, capsys=capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("way", WAYS)
def test_the_model_itself_is_never_replaced(way, folder, tmp_path, monkeypatch, capsys):
    result = tmp_path / "result"
    pliant.save(pliant.load(folder), result)  # a result of ours is a model that more can be done to
    (tmp_path / "link").symlink_to(result)
    monkeypatch.chdir(tmp_path)
    before = contents(result)
    for source, out in (
        (result, result),
        ("link", result),
        (result, "link"),
        ("result", tmp_path / "x" / ".." / "result"),
    ):
        with pytest.raises(ArtefactError, match="is the model itself; name another folder"):
            WAYS[way](source, out, monkeypatch=monkeypatch, capsys=capsys)
    assert contents(result) == before


@pytest.mark.parametrize("way", WAYS)
def test_what_the_model_lies_in_is_never_replaced(way, folder, tmp_path, monkeypatch, capsys):
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match="is not an earlier result"):
        WAYS[way](folder, tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("way", WAYS)
def test_an_earlier_result_is_replaced_whole(way, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    pliant.save(pliant.load(folder), out, max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    shutil.rmtree(folder / "additional_chat_templates")
    WAYS[way](folder, out, monkeypatch=monkeypatch, capsys=capsys)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not (out / "additional_chat_templates").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == ["out"]
    check_target(out, overwrite=True)  # and can be so again


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_result_has_the_usual_permissions(umask, folder, tmp_path):
    before = os.umask(umask)
    try:
        out = pliant.save(pliant.load(folder), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_result_lists_its_files(folder, tmp_path):
    import yaml

    pliant.save(pliant.load(folder), tmp_path / "out")
    assert set(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["files"]) == files_in(tmp_path / "out")


def test_a_file_that_comes_in_meanwhile_is_kept(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = pliant.load(folder)
    pliant.save(model, out)
    save_pretrained = model.save_pretrained

    def slow(*given, **options):
        save_pretrained(*given, **options)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(model, "save_pretrained", slow)
    with pytest.raises(ArtefactError, match=r"would be lost: notes\.txt"):
        pliant.save(model, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert pliant.load(out).config.model_type == "llama"


def test_the_demo_replaces_nothing_else(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="is not an earlier result"):
        demo(tmp_path, Progress())
    assert contents(tmp_path) == {"small/thesis.txt": b"mine"}
    with pytest.raises(ArtefactError, match="cannot write"):
        demo(tmp_path / "small" / "thesis.txt", Progress())


def test_a_folder_of_work_that_is_none_is_left_alone(folder, tmp_path):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"holds files that no run has written: notes\.txt"):
        by_compress(folder, tmp_path / "out")
    assert contents(work) == {"notes.txt": b"mine"}
    shutil.rmtree(work)
    work.write_text("a file")
    with pytest.raises(ArtefactError, match="cannot write into"):
        by_compress(folder, tmp_path / "out")
    assert work.read_text() == "a file"


# -------------------------------------------------------------------------------------------------------------------
# places


def test_a_place_that_cannot_become_a_result_is_refused(folder, tmp_path, monkeypatch):
    model = pliant.load(folder)
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for out, said in (
        (".", "is the current folder"),
        ("..", "is a parent of the current folder"),
        ("/proc", "is a mount point"),
        (tmp_path / ("n" * 300), "File name too long"),
        (folder / "config.json" / "out", "cannot write into"),
    ):
        with pytest.raises(ArtefactError, match=said):
            pliant.save(model, out, overwrite=True)


def test_a_place_may_be_named_in_any_way(folder, tmp_path, monkeypatch):
    model = pliant.load(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    names = ["relative", "not/yet/there", "~/at home", "empty", "slash/", tmp_path / "absolute", "n" * 255]
    for name in names:
        written = pliant.save(model, name)
        assert written == tmp_path / str(name).removeprefix("~/")
        assert torch.equal(logits(pliant.load(name)), logits(model))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_result_that_cannot_be_moved_is_copied_aside(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = pliant.load(folder)
    pliant.save(model, out)
    before = contents(out)
    replace = os.replace

    def within_the_image(source, destination):  # as the file system of a container: what is in the image stays there
        if Path(source) == out:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, destination)

    monkeypatch.setattr(targets.os, "replace", within_the_image)
    pliant.apply(model, HALF, progress=False)
    pliant.save(model, out, overwrite=True)
    assert torch.equal(logits(pliant.load(out)), logits(model))
    assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == ["out"]

    after = contents(out)
    assert after != before

    def broken(source, destination):
        if Path(destination) == out and not Path(source).name.endswith(".old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        within_the_image(source, destination)

    monkeypatch.setattr(targets.os, "replace", broken)
    with pytest.raises(ArtefactError, match="the disk is full; nothing was written"):
        pliant.save(model, out, overwrite=True)
    assert contents(out) == after
    assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == ["out"]


@pytest.mark.parametrize("memory", [None, "1GB"])
def test_shards_are_as_large_as_asked(memory, folder, tmp_path):
    model = pliant.load(folder, memory=memory)
    for size in ("20KB", 20_000):
        pliant.save(model, tmp_path / str(size), max_shard_size=size)
        shards = list((tmp_path / str(size)).glob("model-*.safetensors"))
        assert len(shards) > 1
        assert torch.equal(logits(pliant.load(tmp_path / str(size))), logits(model))
    for size in ("much", "5XB", "-1GB", 0, -5):
        with pytest.raises(ArtefactError, match="max_shard_size"):
            pliant.save(model, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------
# companions

TAKEN = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
    ),
    *(
        "merges.txt",
        "tokenizer.model",
        "tokenizer.model.v3",
        "sentencepiece.bpe.model",
        "spiece.model",
        "source.spm",
        "tekken.json",
    ),
    *(
        "qwen.tiktoken",
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
    ),
    *(
        "video_preprocessor_config.json",
        "normalizer.json",
        "tokenization_mine.py",
        "modeling_mine.py",
        "LICENSE",
        "NOTICE",
    ),
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    *("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "config_sentence_transformers.json"),
)
LEFT = (
    *(
        "pytorch_model.bin",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "model.onnx",
        "consolidated.00.pth",
    ),
    *(
        "original/params.json",
        "original/tokenizer.model",
        "params.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ),
    *(
        "training_args.bin",
        "trainer_state.json",
        "checkpoint-5/config.json",
        "checkpoint-5/model.safetensors",
        "README.md",
    ),
    *(
        "hf_quant_config.json",
        "quantize_config.json",
        "adapter_config.json",
        ".gitattributes",
        ".cache/huggingface/x.json",
    ),
    *(
        "train.jsonl",
        "data/rows.json",
        "logo.png",
        "search.jsonl",
        "report.json",
        "measured.json",
        "stages.json",
        "1-multipruner/search.jsonl",
        "model.safetensors.index.json",
    ),
    *("openvino_model.xml", "events.log"),
)
MODULES = [
    {"path": ""},
    {"path": "1_Pooling"},
    {"path": "2_Dense"},
    {"path": "../elsewhere"},
    {"path": "/etc"},
    {"path": 3},
]


@pytest.fixture
def furnished(tmp_path):
    """A model folder with everything that such folders are seen to hold."""
    place = tmp_path / "furnished"
    pico().save_pretrained(place)
    for name in (*TAKEN, *LEFT):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(MODULES) if name == "modules.json" else "{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.json").write_text("{}")
    (place / "adapter_config.json").unlink()  # with it, peft would load an adapter
    return place


def test_what_belongs_to_a_model_is_copied_and_nothing_else(furnished, tmp_path):
    model = pliant.load(furnished)
    pliant.apply(model, HALF, progress=False)
    pliant.save(model, tmp_path / "out")
    written = files_in(tmp_path / "out")
    assert written >= set(TAKEN)
    ours = {"config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "README.md"}
    assert written == {*TAKEN, *ours}
    assert "compressed by pliant" in (tmp_path / "out" / "README.md").read_text()
    pliant.save(pliant.load(tmp_path / "out"), tmp_path / "again")  # a result is a source like any other
    assert files_in(tmp_path / "again") == written


def test_code_is_copied_and_never_run(furnished, tmp_path):
    code = "raise SystemExit('this was run')"
    (furnished / "tokenization_mine.py").write_text(code)
    pliant.save(pliant.load(furnished), tmp_path / "out")
    assert (tmp_path / "out" / "tokenization_mine.py").read_text() == code


def test_large_files_are_not_copied(furnished):
    with (furnished / "corpus.txt").open("wb") as file:
        file.truncate(2**27 + 1)
    os.mkfifo(furnished / "pipe.json")
    names = {path.as_posix() for path in companions(furnished)}
    assert names == set(TAKEN)


HUB = """
import sys, pliant
model = pliant.load("owner/name")
assert model.name_or_path == "owner/name"
pliant.save(model, sys.argv[1])
"""


def test_a_model_of_a_hub_brings_its_files_and_no_links(folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--owner--name"
    (folder / "processor_config.json").write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = root / "blobs" / f"{number:040x}", root / "snapshots" / commit / path.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", HUB, str(tmp_path / "by name")], env=env, check=True, capture_output=True)
    pliant.save(pliant.load(root / "snapshots" / commit), tmp_path / "by folder")
    for out in (tmp_path / "by name", tmp_path / "by folder"):
        assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json"} <= files_in(out)
        assert not (out / "onnx").exists()
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert (out / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


CONFIGURATION = """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "NAME"
"""
DERIVED = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def modeling(own_layers):
    """Code of a model: derived from a class of transformers, or with layers of its own."""
    if not own_layers:
        return DERIVED
    code = (Path(transformers.__file__).parent / "models" / "llama" / "modeling_llama.py").read_text("utf-8")
    own = code.replace("from ...", "from transformers.").replace("LlamaForCausalLM", "MineForCausalLM")
    return own.replace(
        "from .configuration_llama import LlamaConfig", "from .configuration_mine import MineConfig as LlamaConfig"
    )


@pytest.mark.parametrize(
    "cut", [None, HALF, pliant.BlockPruner(ratio=0.1, samples=4, seqlen=32)], ids=["dense", "narrow", "short"]
)
@pytest.mark.parametrize("own_layers", [False, True])
@pytest.mark.parametrize("load", ["pliant.load", "from_pretrained"])
def test_a_model_with_code_of_its_own_stays_loadable(load, own_layers, cut, tokenizer, prose, tmp_path):
    source, out = tmp_path / f"source_{tmp_path.name}", tmp_path / f"out_{tmp_path.name}"
    kind = f"mine_{tmp_path.name}"  # transformers remembers the classes of a kind for as long as the process lasts
    pico().save_pretrained(source)
    (source / "configuration_mine.py").write_text(CONFIGURATION.replace("NAME", kind))
    (source / "modeling_mine.py").write_text(modeling(own_layers))
    known = json.loads((source / "config.json").read_text())
    own = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    known |= {"model_type": kind, "architectures": ["MineForCausalLM"], "auto_map": own}
    (source / "config.json").write_text(json.dumps(known))
    tokenizer.save_pretrained(source)
    load = pliant.load if load == "pliant.load" else transformers.AutoModelForCausalLM.from_pretrained
    model = load(source, trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM"
    assert type(model.model.layers[0]).__module__.startswith("transformers_modules") == own_layers
    if cut is not None:
        pliant.apply(model, cut, prose, progress=False, tokenizer=tokenizer)
    pliant.save(model, out)
    with pytest.raises(ArtefactError, match="trust_remote_code=True"):
        pliant.load(out)
    again = load(out, trust_remote_code=True)
    assert type(again).__name__ == "MineForCausalLM"
    assert torch.equal(logits(again), logits(model))


# ----------------------------------------------------------------------------------------------- what transformers
# would refuse

GENERATION = {
    "flags that contradict each other": {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2},
    "beams of another mode": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "nothing unusual": {"do_sample": True, "temperature": 0.9},
}


@pytest.mark.parametrize("memory", [None, "1GB"])
@pytest.mark.parametrize("kind", GENERATION)
def test_a_generation_config_is_written_as_it_was(kind, memory, folder, tmp_path):
    given = GENERATION[kind]
    (folder / "generation_config.json").write_text(json.dumps(given))
    model = pliant.load(folder, memory=memory)
    own = model.generation_config
    pliant.apply(model, HALF, progress=False)
    pliant.save(model, tmp_path / "out")
    assert model.generation_config is own
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written.get(key, transformers.GenerationConfig().to_dict().get(key)) for key in given} == given
    assert pliant.load(tmp_path / "out").generation_config.to_dict() == own.to_dict() | {
        "transformers_version": transformers.__version__
    }


def searched(_self, _job):
    raise AssertionError("this model cannot be saved, and yet a search began")


@pytest.mark.parametrize("fault", ["quantiser", "adapter", "config", "tokenizer"])
def test_what_cannot_be_saved_is_refused_before_the_search(fault, folder, prose, tmp_path, monkeypatch):
    def loaded(*given, **options):
        model = pliant.load(*given, **options)
        if fault == "quantiser":
            model.save_pretrained = lambda *_, **__: (_ for _ in ()).throw(ValueError("it is not serializable"))
        elif fault == "adapter":
            model.peft_config = {"default": object()}
        elif fault == "config":
            model.config.own_setting = object()
        return model

    if fault == "tokenizer":
        (folder / "notes.txt").symlink_to("/proc/self/mem")  # cannot be read
    monkeypatch.setattr(runs, "load", loaded)
    monkeypatch.setattr(pliant.MultiPruner, "run", searched)
    said = {"adapter": "merge_and_unload"}.get(fault, "cannot save this model")
    with pytest.raises(ArtefactError, match=said):
        runs.compress(folder, pliant.MultiPruner(ratio=0.1), prose, tmp_path / "out", progress=Progress())
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------------------------------------------------------
# dequantised


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """An FP8 model, and the model that it was made from."""
    place = tmp_path_factory.mktemp("fp8")
    shape = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        config("qwen3", **shape, num_hidden_layers=2, dtype="bfloat16")
    )
    made = made.to(torch.bfloat16).eval()
    made.save_pretrained(place)
    state = load_file(place / "model.safetensors")
    for name in [name for name in state if "proj" in name]:  # one block of 128 x 128, one scale
        scale = state[name].float().abs().max() / 448
        state[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale.view(1, 1)
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((place / "config.json").read_text())
    known["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (place / "config.json").write_text(json.dumps(known))
    return place, made


def near(one, other):
    ours, theirs = logits(one).float(), logits(other).float()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on an accelerator FP8 stays FP8")
@pytest.mark.parametrize("save", ["save_pretrained", "pliant.save"])
@pytest.mark.parametrize("load", ["from_pretrained", "pliant.load"])
@pytest.mark.parametrize("step", [pliant.Magnitude(sparsity=0.1), HALF], ids=["values", "shapes"])
def test_a_dequantised_model_is_saved_as_what_it_is(step, load, save, fp8, tmp_path):
    place, made = fp8
    load = pliant.load if load == "pliant.load" else transformers.AutoModelForCausalLM.from_pretrained
    model = load(place)
    assert near(model, made) < 0.1
    pliant.apply(model, step, progress=False)
    model.save_pretrained(tmp_path / "out") if save == "save_pretrained" else pliant.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(pliant.load(tmp_path / "out")), logits(model))


def test_a_quantised_model_is_not_read_within_a_memory_limit(fp8):
    with pytest.raises(ArtefactError, match=re.escape("quantised (fp8)")):
        pliant.load(fp8[0], memory="1GB")


@pytest.mark.parametrize("name", ["t5", "gpt_neo"])
def test_a_model_of_no_known_layout_that_was_not_cut_is_saved(name, tmp_path):
    small = (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        if name == "t5"
        else {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    )
    made = transformers.AutoConfig.for_model(name, vocab_size=300, **small)
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    auto.from_config(made).save_pretrained(tmp_path / "source")
    model = pliant.load(tmp_path / "source")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    pliant.save(model, tmp_path / "out")
    again = pliant.load(tmp_path / "out").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


def test_the_commit_of_a_hub_is_known_where_transformers_keeps_it():
    """Where no supported transformers does, pliant.compat.hub_revision can go."""
    keeps_it = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
    model = SimpleNamespace(config=transformers.LlamaConfig(_commit_hash="0123"))
    assert revision_of(model) == ("0123" if keeps_it else None)


def test_a_module_that_is_no_model_of_transformers_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"pliant\.save writes transformers models, not a Sequential"):
        pliant.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_deletes_what_a_killed_one_left_and_restores_what_it_set_aside(tmp_path):
    left, aside, of_the_user = (
        ".out.pliant-abcd1234",
        ".out.pliant-efgh5678.old",
        (".out.original", ".out.kept.old", ".other"),
    )
    for name in (left, aside, *of_the_user):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_leftovers(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {*of_the_user, "out"}
    assert (tmp_path / "out" / "file").read_text() == aside
