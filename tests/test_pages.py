"""Models larger than the memory they may take: the same numbers, the same result, and the limit is held."""

import copy
import gc
import inspect
import json
import re
import subprocess
import sys
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

import pliant
from pico import ARCHITECTURES, LAYOUTS, config, logits, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.checkpoint.paged import _SEQUENTIAL
from pliant.elastic import Subnet
from pliant.errors import ArtefactError, MemoryLimitError
from pliant.formatting import parse_bytes
from pliant.measure.prefix_scorer import PrefixScorer, footprint
from pliant.pages import Pages, in_file, within_limit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process has")

WINDOWS = torch.randint(3, 259, (5, 8), generator=torch.Generator().manual_seed(7))
TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
FEW = {"samples": 8, "width_samples": 8, "seqlen": 32}


@pytest.fixture
def stored(tmp_path):
    def store(name="llama", **overrides):
        model = pico(name, **overrides)
        model.save_pretrained(tmp_path / name, max_shard_size="30KB")
        tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return store


def paged(folder, limit="1GB"):
    return pliant.load(folder, memory=limit)


def same_as_loaded_plainly(model, plain):
    """Every parameter and buffer, those that no checkpoint holds included, ties, types, settings and logits."""
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, of)()), dict(getattr(plain, of)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(in_file(parameter) for parameter in model.parameters())
    assert {p.requires_grad for p in model.parameters()} == {p.requires_grad for p in plain.parameters()}
    assert type(model) is type(plain)
    assert model.dtype == plain.dtype
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._attn_implementation == plain.config._attn_implementation
    if model.can_generate():
        assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    if model.get_output_embeddings() is not None:
        ties = [one.get_input_embeddings().weight is one.get_output_embeddings().weight for one in (model, plain)]
        assert ties[0] == ties[1]
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_in_files_are_what_weights_in_memory_are(name, stored, tmp_path):
    folder = stored(name)
    model, plain = paged(folder), pliant.load(folder)
    same_as_loaded_plainly(model, plain)
    pliant.save(model, tmp_path / "from files")
    pliant.save(plain, tmp_path / "from memory")
    ours, theirs = (tensors(tmp_path / f"from {place}") for place in ("files", "memory"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def tensors(folder):
    """All that is stored in a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewritten(folder, change):
    """A folder with one file of weights, changed as ``change`` says."""
    state = tensors(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    change(state)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def configured(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIES = {
    "tied, the embedding alone": (True, lambda _: None),
    "tied, the head alone": (True, lambda state: state.update({HEAD: state.pop(EMBEDDING)})),
    "tied, both alike": (True, lambda state: state.update({HEAD: state[EMBEDDING].clone()})),
    "tied, but they differ": (True, lambda state: state.update({HEAD: state[EMBEDDING] * 2})),
    "untied": (False, lambda state: state.update({HEAD: state[EMBEDDING] * 2})),
    "the trunk without its prefix": (
        True,
        lambda state: [state.update({name.removeprefix("model."): state.pop(name)}) for name in list(state)],
    ),
}


@pytest.mark.parametrize("tie", TIES)
def test_embeddings_are_tied_as_without_a_limit(tie, stored):
    tied, change = TIES[tie]
    folder = configured(rewritten(stored("llama", tie_word_embeddings=True), change), tie_word_embeddings=tied)
    same_as_loaded_plainly(paged(folder), pliant.load(folder))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("named", [None, "float16"])
def test_tensors_of_several_types_become_one_as_without_a_limit(dtype, named, stored):
    def change(state):
        for number, name in enumerate(sorted(state)):
            state[name] = state[name].to((torch.bfloat16, torch.float32, torch.float16)[number % 3])

    folder = configured(rewritten(stored(), change), dtype=named)
    same_as_loaded_plainly(pliant.load(folder, memory="1GB", dtype=dtype), pliant.load(folder, dtype=dtype))


def test_a_stale_index_beside_a_whole_file_is_not_read(stored):
    folder = stored()
    shards = {file: file.read_bytes() for file in folder.glob("model*")}
    rewritten(folder, lambda state: [state[name].add_(1) for name in state])
    for file, content in shards.items():
        file.write_bytes(content)
    same_as_loaded_plainly(paged(folder), pliant.load(folder))
    for file in shards:
        if file.suffix == ".safetensors":
            file.unlink()
    same_as_loaded_plainly(paged(folder), pliant.load(folder))


def test_weights_of_another_name_are_found(stored):
    folder = rewritten(stored(), lambda _: None)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    configured(folder, transformers_weights="weights.safetensors")
    same_as_loaded_plainly(paged(folder), pliant.load(folder))


METHODS = ("fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4", "pliant")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_a_quantised_model_is_refused(method, where, stored):
    said = {"quant_method": method}
    folder = configured(stored(), **{where: {"quantization_config": said} if where == "text_config" else said})
    with pytest.raises(ArtefactError, match=rf"quantised \({method}\).*not read within a memory limit"):
        paged(folder)


def test_a_packed_model_is_refused(stored, tmp_path):
    model = pliant.load(stored())
    pliant.apply(model, pliant.PackedLinear(format="int8"), progress=False)
    pliant.save(model, tmp_path / "packed")
    with pytest.raises(ArtefactError, match="quantised"):
        paged(tmp_path / "packed")


def test_what_is_no_plain_model_is_refused(stored):
    folder = stored()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtefactError, match="holds a peft adapter"):
        paged(folder)


def test_weights_that_are_not_safetensors_are_refused(stored):
    folder = stored()
    state = tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert pliant.load(folder).config.model_type == "llama"
    with pytest.raises(ArtefactError, match="no safetensors weights"):
        paged(folder)


@pytest.mark.parametrize("name", [*LAYOUTS, "qwen3_moe"])
def test_a_model_that_was_cut_loads_into_files_too(name, stored, tmp_path):
    model = pliant.load(stored(name))
    pliant.apply(model, pliant.ChannelPruner(ratio=0.1), progress=False)
    pliant.apply(model, pliant.BlockPruner(ratio=0.1, samples=4, seqlen=32), TEXT, progress=False)
    pliant.save(model, tmp_path / "cut")
    same_as_loaded_plainly(paged(tmp_path / "cut"), pliant.load(tmp_path / "cut"))


def test_experts_that_are_stored_one_by_one_take_room_while_they_load(stored):
    folder = stored("mixtral")
    largest = max(parameter.nbytes for parameter in pliant.load(folder).parameters())
    with pytest.raises(MemoryLimitError, match="while it is loaded"):
        paged(folder, 2 * largest)


def test_a_dtype_can_be_chosen(stored):
    model = pliant.load(stored(), memory="1GB", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("settings", [{}, {"repair": 8}, {"metric": "kl"}, {"order": "activation"}], ids=str)
def test_pruning_gives_the_same_model(name, settings, stored, tmp_path):
    folder = stored(name)
    step = pliant.MultiPruner(ratio=0.25, mlp_group=8, **FEW, **settings)
    models = [paged(folder), pliant.load(folder)]
    for model in models:
        pliant.apply(model, step, TEXT, progress=False)
    one, other = (model.pliant_history[0] for model in models)
    assert one["subnet"] == other["subnet"]
    assert one["points"][-1]["loss"] == pytest.approx(other["points"][-1]["loss"], abs=1e-5)
    pliant.save(models[0], tmp_path / "cut")
    assert models[0].pliant_pages.peak > 0
    again = pliant.load(tmp_path / "cut").state_dict()
    assert again.keys() == models[1].state_dict().keys()
    for key, tensor in models[1].state_dict().items():
        assert torch.allclose(again[key], tensor, atol=1e-5), key
        assert "repair" in settings or torch.equal(again[key], tensor)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma2"])
def test_the_gradient_goes_through_files_too(name, stored):
    folder = stored(name)
    models = [paged(folder), pliant.load(folder)]
    for model in models:
        pliant.apply(model, pliant.FisherPruner(ratio=0.1, group=8, samples=4, seqlen=32), TEXT, progress=False)
    one, other = (model.pliant_history[0]["subnet"] for model in models)
    assert one == other
    assert one["keep"]
    for key, tensor in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[key], tensor), key


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
@pytest.mark.parametrize("stretch", [1, 2, 3])
def test_scores_layer_by_layer_are_the_same(metric, stretch):
    model = pico("llama")
    anatomy = anatomy_of(model)
    cuts = [Subnet(), Subnet().without("layers.2.mlp"), Subnet().keeping("layers.0.mlp.channels", 16)]

    def scores(**settings):
        walk = PrefixScorer(model, anatomy, WINDOWS, metric=metric, **settings)
        walk.rebase(cuts[1])
        try:
            return [walk.score(subnet) for subnet in cuts]
        finally:
            walk.close()

    assert scores(stretch=stretch) == scores()


def test_logits_of_a_few_tokens_at_a_time_give_the_same_loss(stored, monkeypatch):
    folder = stored()
    plain = pliant.evaluate(pliant.load(folder), perplexity=TEXT, seqlen=32)["perplexity"]["a list"]
    model = paged(folder)
    monkeypatch.setattr(model.pliant_pages, "limit", 5 * 16 * 300 * 4)  # five tokens at once
    found = pliant.evaluate(model, perplexity=TEXT, seqlen=32)["perplexity"]["a list"]
    assert found["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert found["windows"] == plain["windows"]


def test_pages_go_and_come_back():
    pages = Pages(64 * 2**20)
    tensor = pages.tensor((25, 2**20), torch.float32)  # 100 MiB
    for row in range(len(tensor)):
        tensor[row] = row
        time.sleep(0.01)  # five looks of the thread
    assert 0 < pages.peak < pages.limit
    pages.release()
    assert tensor[:, 0].tolist() == list(range(25))
    assert torch.equal(pages.copy(tensor[3]), tensor[3])


def test_a_copy_of_a_model_is_in_memory(stored):
    model = paged(stored())
    again = copy.deepcopy(model)
    assert again.pliant_pages is None
    expected = logits(model)
    assert torch.equal(logits(again), expected)
    files = weakref.ref(model.pliant_pages)
    del model
    gc.collect()
    until = time.monotonic() + 10
    while files() is not None and time.monotonic() < until:  # the thread that watches has them for the time of one look
        time.sleep(0.01)
    assert files() is None
    assert torch.equal(logits(again), expected)


def test_what_is_needed_is_known_beforehand(stored):
    folder = stored()
    model = paged(folder)
    anatomy = anatomy_of(model)
    plain = footprint(pliant.load(folder), anatomy, WINDOWS, "perplexity")
    assert plain.weights == sum(p.nbytes for p in model.parameters())
    assert plain.stretch == anatomy.depth
    found = footprint(model, anatomy, WINDOWS, "perplexity")  # the limit is far away
    assert (found.hidden, found.logits, found.stretch) == (plain.hidden, plain.logits, plain.stretch)
    assert found.weights < plain.weights  # of the embedding, only a few rows are read
    model.pliant_pages.limit = 300_000
    tight = footprint(model, anatomy, WINDOWS, "perplexity")
    assert tight.total <= 300_000
    assert tight.stretch < anatomy.depth
    model.pliant_pages.limit = 40_000
    with pytest.raises(MemoryLimitError, match="is too low for windows of 8 tokens"):
        footprint(model, anatomy, WINDOWS, "perplexity")


LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
LARGE |= {"num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 128}
PROGRAM = [sys.executable, "-c", "from pliant.cli import main; main()"]


@pytest.mark.slow
def test_half_the_memory_gives_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("llama", **LARGE))
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    whole = sum(p.nbytes for p in model.parameters())
    del model
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT.rows))
    command = ["compress", str(tmp_path / "dense"), "--ratio", "0.02", "--data", str(tmp_path / "text.txt"), "--json"]
    command += ["--system", "blockpruner", "--windows", "1", "--no-speed", "--set", "samples=1", "--set", "seqlen=32"]

    def run(name, *more):
        outcome = subprocess.run(
            [*PROGRAM, *command, "--out", str(tmp_path / name), *more], capture_output=True, text=True
        )
        assert outcome.returncode == 0, outcome.stderr
        return json.loads(outcome.stdout), outcome.stderr

    plain, _ = run("plain")
    limited, told = run("limited", "--memory", str(whole // 2))
    assert limited["memory"]["limit"] == whole // 2
    assert limited["memory"]["peak"] < whole // 2
    assert "the limit is" in told
    assert limited["steps"][0]["subnet"] == plain["steps"][0]["subnet"]
    one, other = (pliant.load(tmp_path / name).state_dict() for name in ("plain", "limited"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"memory": "lots"}, MemoryLimitError, "not 'lots'"),
        ({"memory": "0GB"}, MemoryLimitError, "not '0GB'"),
        ({"memory": 20_000}, MemoryLimitError, "the largest tensor"),
        ({"memory": "1GB", "device_map": "cpu"}, ArtefactError, "without other options; not device_map"),
    ],
)
def test_a_limit_that_cannot_be_held_is_refused(given, error, told, stored):
    with pytest.raises(error, match=told):
        pliant.load(stored(), **given)


def test_other_places_than_folders_are_refused(stored, tmp_path):
    with pytest.raises(ArtefactError, match="only a model folder"):
        pliant.load("owner/name", memory="1GB")
    folder = stored()
    with pytest.raises(ArtefactError, match="cannot keep weights in"):
        pliant.load(folder, memory="1GB", scratch=tmp_path / "nowhere")


def test_a_missing_tensor_is_named(stored):
    folder = rewritten(stored(), lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ArtefactError, match=r"lacks 1 tensor\(s\), such as 'model.layers.1.mlp.up_proj.weight'"):
        paged(folder)


def test_training_within_a_limit_is_refused(stored):
    with pytest.raises(MemoryLimitError, match="training keeps all weights in memory"):
        pliant.apply(paged(stored()), [pliant.BlockPruner(ratio=0.1), pliant.Recover(steps=1)], TEXT, progress=False)


def test_repair_of_too_many_rows_is_refused_before_the_search(stored):
    model = paged(stored())
    model.pliant_pages.limit = 200_000
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(MemoryLimitError, match="repair with 30 rows needs"):
        pliant.apply(model, pliant.BlockPruner(ratio=0.1, samples=4, seqlen=32, repair=30), TEXT, progress=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.slow
def test_bad_memory_on_the_command_line_is_one_line(stored, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT.rows))
    command = ["compress", str(stored()), "--ratio", "0.1", "--data", str(tmp_path / "text.txt"), "--json"]
    command += ["--out", str(tmp_path / "small"), "--memory", "much"]
    outcome = subprocess.run([*PROGRAM, *command], capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1].startswith("pliant: memory must be a number with a unit")
    assert not list(tmp_path.glob("small*"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512), ("300m", 3 * 10**8), ("7kib", 7168), ("1TB", 10**12)],
)
def test_amounts_of_memory_are_read(text, count):
    assert parse_bytes(text) == count


def test_pages_are_given_back_after_each_part_of_a_loop():
    class Model:
        pliant_pages = None

    class Watched:
        held = 0

        def hold(self):
            self.held += 1

    assert [*within_limit(Model(), "abc")] == ["a", "b", "c"]
    model = Model()
    model.pliant_pages = pages = Watched()
    assert [(part, pages.held) for part in within_limit(model, "abc")] == [("a", 0), ("b", 1), ("c", 2)]
    assert pages.held == 3


def test_transformers_reads_the_variable_by_which_it_loads_one_tensor_after_another():
    assert re.search(rf"(is_env_variable_true|environ)\S*\(\W*{_SEQUENTIAL}", inspect.getsource(core_model_loading))
