"""The user chooses device and dtype: a missing device is refused, and tensors stay on the model's device."""

import copy
import json
from unittest.mock import Mock

import pytest
import torch

import pliant
from elsewhere import Elsewhere, FakeDevice, WanderingError, moved
from pico import pico
from pliant import device as devices
from pliant.anatomy import anatomy_of
from pliant.data import Continuation, OpenQuestion, Question
from pliant.device import device_of, is_short_of_memory, to_float64, total
from pliant.elastic import Subnet
from pliant.errors import DeviceError, MemoryLimitError
from pliant.forward import windows as windowing
from pliant.forward.windows import tokens_at_once, within_memory
from pliant.measure.prefix_scorer import PrefixScorer, footprint, store_bytes
from pliant.measure.speed.latency_table import measure_latency
from pliant.measure.speed.token_breakdown import token_time
from pliant.runtime import dense as dense_layers

WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "looked", "at", "dogs", "that", "ran", "over", "hills"]
TEXT = pliant.text([" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) for i in range(1, 30)])
WINDOWS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(0))
FEW = {"samples": 2, "seqlen": 32}
GB = 2**30


@pytest.fixture
def mps(monkeypatch):
    """A machine with an Apple GPU that is not there."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, found in {
        "recommended_max_memory": lambda: 8 * GB,
        "driver_allocated_memory": lambda: GB,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda: torch.get_rng_state(),
        "set_rng_state": lambda state: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.mps, name, found)
    monkeypatch.setattr(torch, "Event", type("Event", (Mock,), {}))  # generate waits for one
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # a parameter's data alone cannot change what it says
    try:
        with FakeDevice() as fake:
            yield fake
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def as_on_cpu(work, model, **options):
    """What ``work`` gives on the CPU, and on the device that is not there."""
    return work(copy.deepcopy(model), **options), work(moved(model), **options)


# --- the fake itself
# ----------------------------------------------------------------------------------------------------


def test_the_device_that_is_not_there_refuses_what_a_real_one_would(mps):
    here = torch.ones(3, device="mps")
    assert here.device.type == "mps"
    assert (here + 1).device.type == (here * torch.tensor(2.0)).device.type == "mps"
    assert here.cpu().device.type == here.to("cpu").device.type == "cpu"
    assert torch.ones(3).to(here.device).device.type == torch.zeros_like(here).device.type == "mps"
    for wrong in (
        lambda: here + torch.ones(3),
        lambda: torch.cat([here, torch.ones(1)]),
        lambda: here.double(),
        lambda: here.sum(dtype=torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda: here.numpy(),
        lambda: torch.nn.functional.linear(here, torch.ones(3, 3)),
    ):
        with pytest.raises(WanderingError):
            wrong()
    assert mps.operations > 0


# --- tensors do not wander
# ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mps")
def test_evaluation_stays_where_the_model_is(tokenizer):
    items = {
        "choices": [Question("the cat", (" sat", " ran"), i % 2) for i in range(4)],
        "open": [OpenQuestion("the cat", "sat")],
        "passages": [Continuation("the cat sat on a red", " mat"), Continuation("dogs that", " ran")],
    }

    def measured(model):
        return pliant.evaluate(
            model,
            perplexity=TEXT,
            reference=pico("llama", seed=1),
            tasks=items,
            tokenizer=tokenizer,
            seqlen=32,
            windows=3,
            max_new_tokens=4,
        )

    there, here = as_on_cpu(measured, pico("llama"))
    assert there == here


@pytest.mark.usefixtures("mps")
@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_a_walk_stays_where_the_model_is(metric):
    def scores(model):
        walk = PrefixScorer(model, anatomy_of(model), WINDOWS, metric=metric)
        walk.rebase(Subnet().without("layers.2.mlp"))
        found = [walk.score(Subnet().without("layers.2.mlp", name)) for name in ("layers.3.mlp", "layers.0.attention")]
        walk.close()
        return found

    there, here = as_on_cpu(scores, pico("llama"))
    assert there == here


STEPS = {
    "blockpruner": pliant.BlockPruner(ratio=0.2, **FEW, search="exact"),
    "multipruner": pliant.MultiPruner(ratio=0.2, **FEW, width_samples=2, mlp_group=8, repair=2),
    "unified per bytes": pliant.UnifiedPruner(ratio=0.2, **FEW, mlp_group=8, per="bytes", metric="kl"),
    "knapsack": pliant.KnapsackPruner(ratio=0.2, **FEW, group=8, swaps=2),
    "fisher": pliant.FisherPruner(ratio=0.2, **FEW, group=8, repair=2),
    "multipruner_evol": pliant.MultiPrunerEvol(
        ratio=0.2, **FEW, width_samples=2, mlp_group=8, population=4, generations=2, tolerance=0.2
    ),
    "cut": pliant.Cut(subnet=Subnet().without("layers.1.mlp")),
    "channelpruner": pliant.ChannelPruner(ratio=0.2),
    **{f"oneshot by {by}": pliant.OneShot(ratio=0.2, **FEW, by=by) for by in ("influence", "magnitude")},
    "magnitude": pliant.Magnitude(sparsity=0.5),
    "rtn": pliant.RTN(bits=4, group=4),
    "recover all weights": pliant.Recover(
        method="full", steps=2, batch_size=2, seqlen=32, eval_steps=1, distillation_weight=0.5
    ),
    "recover with adapters": pliant.Recover(method="lora", steps=2, batch_size=2, seqlen=32, eval_steps=1),
}


@pytest.mark.slow
@pytest.mark.usefixtures("mps")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_where_the_model_is_and_does_the_same(name, tokenizer, monkeypatch):
    monkeypatch.setattr(dense_layers, "PLAIN", (torch.nn.Parameter, Elsewhere))  # its values are numbers, too
    if "adapters" in name:
        pytest.importorskip("peft")
    step = STEPS[name]
    dense = pico("llama", seed=1)

    def done(model):
        given = moved(dense) if isinstance(next(model.parameters()), Elsewhere) else dense
        return pliant.apply(model, step, TEXT, tokenizer=tokenizer, dense=given, progress=False)

    there, here = as_on_cpu(done, pico("llama"))
    assert next(here.parameters()).device.type == "mps"
    assert all(parameter.device.type == "mps" for parameter in here.parameters())
    ours, theirs = here.state_dict(), there.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key].cpu(), tensor, rtol=1e-5, atol=1e-6)
    assert here.pliant_history[0].get("subnet") == there.pliant_history[0].get("subnet")


@pytest.mark.usefixtures("mps")
def test_looking_and_timing_stay_where_the_model_is():
    model = moved(pico("llama"))
    assert pliant.inspect(model)["device"] == "mps"
    timed = pliant.bench(model, prompt=4, tokens=2, repeats=1)
    assert timed["on"] == {"model": {"device": "mps", "dtype": "float32"}}
    assert token_time(model, prompt=4, tokens=2)["total"] > 0
    assert measure_latency(model, anatomy_of(model), "decode", repeats=1).of(anatomy_of(model)) > 0


# --- loading
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mps")
def test_a_model_is_loaded_where_it_is_asked_for(folder):
    for name in ("mps", "auto"):
        model = pliant.load(folder, device=name)
        assert {parameter.device.type for parameter in model.parameters()} == {"mps"}
        assert {buffer.device.type for buffer in model.buffers()} == {"mps"}
    assert pliant.load(folder).device.type == pliant.load(folder, device="cpu").device.type == "cpu"


@pytest.mark.usefixtures("mps")
def test_a_packed_model_stays_on_the_cpu(folder, tmp_path):
    model = pliant.apply(pliant.load(folder), pliant.PackedLinear(format="bf16"), progress=False)
    pliant.save(model, tmp_path / "packed")
    assert pliant.load(tmp_path / "packed", device="auto").device.type == "cpu"
    with pytest.raises(DeviceError, match="packed layers run on the CPU"):
        pliant.load(tmp_path / "packed", device="mps")


@pytest.mark.usefixtures("mps")
def test_an_apple_gpu_has_no_float64(folder):
    with pytest.raises(DeviceError, match="mps has no float64; load the model with dtype='float32'"):
        pliant.load(folder, device="mps", dtype="float64")


@pytest.mark.usefixtures("mps")
def test_a_device_without_room_for_the_weights_is_refused(folder, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(
        DeviceError, match=r"the weights take .* mps has 7\.0 GiB free; load the model with dtype='bfloat16'"
    ):
        pliant.load(folder, device="mps")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_here_is_refused(name, folder):
    with pytest.raises(DeviceError, match=rf"finds no device '{name}' on this machine; it finds cpu"):
        pliant.load(folder, device=name)
    assert device_of("auto").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "tpu:0"])
def test_a_device_that_is_none_is_refused(name):
    with pytest.raises(DeviceError, match="choose one of auto, cuda, mps, cpu"):
        device_of(name)


def test_the_second_gpu_of_two_is_there_and_the_third_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1") == torch.device("cuda", 1)
    assert device_of("auto").type == "cuda"
    with pytest.raises(DeviceError, match="finds no device 'cuda:2' on this machine; it finds cuda, cuda:1, cpu"):
        device_of("cuda:2")


@pytest.mark.usefixtures("mps")
def test_options_that_contradict_each_other_are_refused(folder, model):
    with pytest.raises(DeviceError, match="device or device_map, not both"):
        pliant.load(folder, device="cpu", device_map="cpu")
    with pytest.raises(DeviceError, match="within a memory limit the model runs on the CPU"):
        pliant.load(folder, device="mps", memory="1GB")
    for work in (pliant.inspect, pliant.bench, lambda *a, **k: pliant.evaluate(*a, perplexity=TEXT, **k)):
        for option in ({"device": "cpu"}, {"dtype": "float32"}):
            with pytest.raises(DeviceError, match=r"this model already is; use model\.to"):
                work(model, **option)


def test_the_same_words_measure_a_folder(folder):
    found = pliant.evaluate(folder, perplexity=TEXT, seqlen=32, windows=2, dtype="bfloat16", device="cpu")
    model = pliant.load(folder, dtype="bfloat16")
    assert found == pliant.evaluate(model, perplexity=TEXT, seqlen=32, windows=2)
    assert found != pliant.evaluate(folder, perplexity=TEXT, seqlen=32, windows=2)
    assert pliant.inspect(folder, dtype="bfloat16", device="auto", self_check=False)["dtype"] == "bfloat16"


# --- float64 where there is some
# -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mps")
def test_sums_are_taken_in_float64_wherever_that_is():
    tensor = torch.rand(50, 40)
    for one in (tensor, tensor.to("mps")):
        assert torch.equal(total(one), tensor.sum(dtype=torch.float64))
        assert torch.equal(total(one, [1]), tensor.sum(1, dtype=torch.float64))
        assert torch.equal(to_float64(one), tensor.double())


# --- memory
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mps")
@pytest.mark.parametrize(
    ("free", "on_cpu", "on_mps"),
    [(None, 512, 512), (0, 1, 1), (10**6, 32, 32), (10**8, 512, 4096), (10**12, 512, 32768)],
)
def test_tokens_at_once_follow_the_free_memory(free, on_cpu, on_mps, monkeypatch):
    monkeypatch.setattr(windowing, "free_memory", lambda _: free)
    model = pico("llama")
    each = (2 * 300 + 24 * 36) * 4
    assert free is None or on_mps == 32768 or on_mps * each <= max(each, free / 4) < 2 * on_mps * each
    assert (tokens_at_once(model), tokens_at_once(moved(model))) == (on_cpu, on_mps)


@pytest.mark.usefixtures("mps")
def test_free_memory_is_told():
    assert devices.free_memory(torch.device("mps")) == 7 * GB
    found = devices.free_memory(torch.device("cpu"))
    assert found is not None
    assert found > 2**20


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryLimitError("the limit is too low"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_is_short(error, short):
    assert is_short_of_memory(error) is short


def test_where_memory_is_short_half_is_tried_until_it_fits(model):
    tried = []

    def work(tokens, fits):
        tried.append(tokens)
        if tokens > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tokens

    assert within_memory(model, lambda tokens: work(tokens, 100)) == 64
    assert tried == [512, 256, 128, 64]
    with pytest.raises(MemoryLimitError, match="cpu has no memory for 16 tokens of this model at a time"):
        within_memory(model, lambda tokens: work(tokens, 0))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        within_memory(model, lambda _: torch.ones(2) @ torch.ones(3))


def tight(model, most):
    """Let a model refuse batches of more tokens, as a GPU of little memory does."""

    def look(_, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model.get_input_embeddings().register_forward_pre_hook(look, with_kwargs=True)
    return model


@pytest.fixture
def down_to_one(monkeypatch):
    monkeypatch.setattr(windowing, "FEWEST_AT_ONCE", 1)


@pytest.mark.usefixtures("down_to_one")
@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_scores_do_not_depend_on_the_batch(metric):
    subnets = [Subnet(), Subnet().without("layers.3.mlp"), Subnet().without("layers.1.attention", "layers.3.mlp")]

    def scores(model, **options):
        walk = PrefixScorer(model, anatomy_of(model), WINDOWS, metric=metric, **options)
        walk.rebase(subnets[1])
        return [walk.score(subnet) for subnet in subnets], walk

    expected, _ = scores(pico("llama"))
    for tokens in (24, 48, 512):
        assert scores(pico("llama"), tokens=tokens)[0] == pytest.approx(expected, rel=1e-6)
    found, walk = scores(tight(pico("llama"), 50))
    assert found == pytest.approx(expected, rel=1e-6)
    assert [len(batch) for batch in walk.batches] == [2] * 3
    assert walk.tokens == 64
    exact = scores(pico("llama"), tokens=64)[0]
    assert found == exact  # as if it had begun so


@pytest.mark.usefixtures("down_to_one")
def test_everything_else_that_reads_windows_makes_do_with_less_memory(tokenizer):
    def cut(step, most=None):
        model = pico("llama") if most is None else tight(pico("llama"), most)
        return pliant.apply(model, step, TEXT, tokenizer=tokenizer, progress=False).pliant_history[0]

    for step in (
        pliant.FisherPruner(ratio=0.2, samples=8, seqlen=32, group=8, repair=8),
        pliant.OneShot(ratio=0.2, samples=8, seqlen=32),
    ):
        assert cut(step, 70)["subnet"] == cut(step)["subnet"]
    items = {
        "choices": [Question("the cat sat on " * i, (" a mat", " red"), 0) for i in range(1, 6)],
        "open": [OpenQuestion("the cat " * 3, "sat") for _ in range(16)],
    }
    settings = {"perplexity": TEXT, "tasks": items, "tokenizer": tokenizer, "seqlen": 32, "windows": 8, "items": True}
    found = pliant.evaluate(tight(pico("llama"), 130), max_new_tokens=4, **settings)
    expected = pliant.evaluate(pico("llama"), max_new_tokens=4, **settings)
    assert found["tasks"] == expected["tasks"]
    ours, theirs = (one["perplexity"]["a list"]["items"]["loss"] for one in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_hidden_states_take_half_of_the_free_memory_at_most(monkeypatch):
    model = pico("llama")
    whole = store_bytes(model, anatomy_of(model), WINDOWS.numel())
    assert footprint(model, anatomy_of(model), WINDOWS, "perplexity").hidden == whole
    monkeypatch.setattr("pliant.measure.prefix_scorer.free_memory", lambda _: whole)
    assert footprint(model, anatomy_of(model), WINDOWS, "perplexity").hidden == whole // 2
    monkeypatch.setattr("pliant.measure.prefix_scorer.free_memory", lambda _: 0)
    assert footprint(model, anatomy_of(model), WINDOWS, "perplexity").hidden == whole // 4


def test_a_search_that_goes_on_takes_as_many_tokens_as_before(tmp_path, tokenizer, monkeypatch):
    def run(ratio):
        model = pico("llama")
        step = pliant.BlockPruner(ratio=ratio, samples=4, seqlen=32, search="exact")
        pliant.apply(model, step, TEXT, tokenizer=tokenizer, work=tmp_path, progress=False)
        return model.pliant_history[0]["counters"]["blocks"]["tokens"]

    monkeypatch.setattr(windowing, "TOKENS_AT_ONCE", 64)
    assert run(0.1) == 64
    lines = [json.loads(line) for line in (tmp_path / "1-blockpruner" / "search.jsonl").read_text().splitlines()]
    assert {line["tokens"] for line in lines[1:]} == {64}
    monkeypatch.setattr(windowing, "TOKENS_AT_ONCE", 512)
    assert run(0.3) == 64
    (tmp_path / "1-blockpruner" / "search.jsonl").write_text(
        "".join(
            json.dumps({k: v for k, v in line.items() if k != "tokens" or line is lines[0]}) + "\n" for line in lines
        )
    )
    assert run(0.3) == 512  # an archive of before says nothing


# --- windows as long as the model reads
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "expected"), [(64, 64), (4096, 2048), (None, 2048)], ids=["few", "many", "no bound"]
)
def test_windows_are_as_long_as_the_model_reads_when_nobody_says(positions, expected, tokenizer):
    class Notes(pliant.progress.Progress):
        said = ()

        def note(self, text):
            self.said += (text,)

    told = Notes()
    model = (
        pico("bloom") if positions is None else pico("llama", max_position_embeddings=positions, num_hidden_layers=2)
    )
    rows = pliant.text([" ".join(WORDS) * 40] * 2)
    step = pliant.OneShot(ratio=0.01, samples=2, by="random")
    pliant.apply(model, step, rows, tokenizer=tokenizer, progress=told)
    assert model.pliant_history[0]["seqlen"] == expected
    assert any(f"windows of {expected} tokens" in text for text in told.said)
    given = pliant.OneShot(ratio=0.01, samples=2, by="random", seqlen=32)
    other = pico("llama")
    pliant.apply(other, given, rows, tokenizer=tokenizer, progress=False)
    assert other.pliant_history[0]["seqlen"] == 32


def test_training_takes_sequences_as_long_as_the_model_reads(tokenizer):
    model = pico("llama", max_position_embeddings=48)
    step = pliant.Recover(method="full", steps=1, batch_size=2, held_out=2)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer, progress=False)
    assert model.pliant_history[0]["recovery"]["seqlen"] == 48
