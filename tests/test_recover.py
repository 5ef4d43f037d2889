from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import pico
import pliant
from pliant.cli.step_options import recipe
from pliant.data.tokenize_examples import IGNORED
from pliant.errors import (
    ArchitectureError,
    DataError,
    DivergedError,
    PliantError,
    ResumeError,
    StepError,
    WeightError,
)
from pliant.progress import Progress
from pliant.run.compress import compress
from pliant.run.recipe import Measuring
from pliant.step import FormerNameWarning, settings_of
from pliant.train.loop import Plan, Training
from pliant.train.loss import Distillation, backward
from pliant.train.trainable import Lora, linear_layers, training_mode
from pliant.train.trunk_and_head import Halves

SENTENCE = "a small river runs past the old mill and turns its wheel while birds sing in tall green trees. "
QUICK = {"steps": 6, "seqlen": 32, "batch_size": 4, "eval_steps": 2, "learning_rate": 5e-3}
METHODS = ("lora", "full")


@pytest.fixture(scope="module")
def repeated():
    return pliant.text([SENTENCE] * 40)


def cut(family="llama", **more):
    """A model without two of its blocks, and narrower in its last layer."""
    model = pico.pico(family, **more)
    anatomy = pliant.anatomy_of(model)
    subnet = pliant.Subnet(frozenset({"layers.1.mlp", "layers.2.attention"} & set(anatomy.blocks)))
    for name, axis in anatomy.axes.items():
        fewer = [units for units in range(1, axis.size) if axis.allows(units)]
        if name.startswith("layers.3.") and fewer:
            subnet = subnet.keeping(name, fewer[-1])
    return pliant.apply(model, pliant.Cut(subnet=subnet, order="stored"), progress=False)


def recover(model, data, tokenizer, *, dense=None, work=None, progress=False, **settings):
    step = pliant.Recover(**QUICK | settings)
    pliant.apply(model, step, data, tokenizer=tokenizer, dense=dense, work=work, progress=progress)
    return model.pliant_history[-1]["recovery"]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], tensor) for name, tensor in state.items())


class Stopping(Progress):
    """Fails once so many optimizer steps are made."""

    def __init__(self, after, error=RuntimeError):
        super().__init__()
        self._left, self._error = after, error

    def step(self, done, text):  # noqa: ARG002
        self._left -= 1
        if self._left == 0:
            raise self._error("stopped")


# what comes out


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "lora") for family in pico.DECODERS), ("llama", "full"), ("gpt2", "full"), ("phi3", "full")],
)
def test_the_loss_falls_and_an_ordinary_model_of_the_same_shapes_comes_out(
    family, method, repeated, tokenizer, tmp_path
):
    model = cut(family)
    before, kinds = weights(model), [type(module) for module in model.modules()]
    record = recover(model, repeated, tokenizer, method=method, learning_rate=2e-2 if method == "lora" else 5e-3)
    held_out = [row["held_out"] for row in record["curve"]]
    assert held_out[-1] < held_out[0] - 0.2
    assert [type(module) for module in model.modules()] == kinds
    assert {name: tensor.shape for name, tensor in weights(model).items()} == {n: t.shape for n, t in before.items()}
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "small")
    assert same(pliant.load(tmp_path / "small"), weights(model))


def test_the_record_says_what_happened(repeated, tokenizer):
    model = cut()
    record = recover(model, repeated, tokenizer, held_out=8)
    assert [row["step"] for row in record["curve"]] == [0, 2, 4, 6]
    assert record["curve"][0]["loss"] is None
    assert record["best_step"] == min(record["curve"], key=lambda row: row["held_out"])["step"]
    assert record["ended_by"] == "steps"
    assert record["steps"] == 6
    assert record["held_out"] == 8
    assert record["tokens"] == 6 * 4 * 32
    assert record["tokens_per_second"] > 0
    assert record["peak_memory"] > 0
    measured = pliant.evaluate(model, perplexity=repeated, seqlen=32, tokenizer=tokenizer)["perplexity"]["a list"][
        "loss"
    ]
    assert measured == pytest.approx(record["curve"][-1]["held_out"], abs=0.1)
    json.dumps(model.pliant_history)


@pytest.mark.parametrize("method", METHODS)
def test_everything_about_the_model_is_as_it_was(method, repeated, tokenizer):
    model = cut()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    generator = torch.get_rng_state()
    recover(model, repeated, tokenizer, method=method, gradient_checkpointing=True)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert torch.get_rng_state().equal(generator)


@pytest.mark.parametrize("method", METHODS)
def test_tied_embeddings_stay_tied(method, repeated, tokenizer):
    model = cut(tie_word_embeddings=True)
    recover(model, repeated, tokenizer, method=method)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_stays_and_is_trained_in_single(method, dtype, repeated, tokenizer):
    model = cut().to(dtype)
    trained = Lora(copy.deepcopy(model), pliant.anatomy_of(model), rank=2, alpha=2, dropout=0, targets=[], seed=0)
    assert {parameter.dtype for parameter in trained.parameters.values()} == {torch.float32}
    record = recover(model, repeated, tokenizer, method=method)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert record["curve"][-1]["held_out"] < record["curve"][0]["held_out"]


def test_the_best_state_is_kept_not_the_last(repeated, tokenizer):
    model = cut()
    before = weights(model)
    record = recover(model, repeated, tokenizer, method="full", learning_rate=1.0, warmup_ratio=0, max_grad_norm=1e9)
    assert record["best_step"] == 0
    assert record["curve"][-1]["held_out"] > record["curve"][0]["held_out"]
    assert same(model, before)
    last = recover(model, repeated, tokenizer, method="full", held_out=0)
    assert last["best_step"] == 6
    assert last["curve"][-1]["held_out"] is None
    assert not same(model, before)


# exactness


MIXERS = ("mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1", "jamba")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", *MIXERS])
def test_merged_adapters_compute_what_they_did_beside_the_weights(family):
    model = cut(family)
    ids = torch.arange(3, 40)[None]
    with training_mode(model, recompute=False):
        trained = Lora(model, pliant.anatomy_of(model), rank=4, alpha=8, dropout=0.5, targets=[], seed=0)
        model.eval()
        with torch.no_grad():
            for parameter in trained.parameters.values():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            beside = model(input_ids=ids, use_cache=False).logits
            trained.finish()
            merged = model(input_ids=ids, use_cache=False).logits
    assert (merged - beside).abs().max() < 1e-5 * beside.abs().max()
    assert not hasattr(model, "peft_config")


@pytest.mark.skipif(not pico.SCANS, reason="the scan of this transformers is not a function")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MIXERS)
def test_adapters_on_scans_are_where_they_have_an_effect(family, repeated, tokenizer, capsys):
    model = pico.pico(family)
    before = weights(model)
    recover(model, repeated, tokenizer, progress=True)
    noted = {
        line.split()[3].rstrip(":"): line for line in capsys.readouterr().err.splitlines() if "no adapter on" in line
    }
    refused = set() if family in ("bamba", "granitemoehybrid", "jamba") else {"out_proj"}
    read = {"dt_proj"} if family in ("mamba", "falcon_mamba", "jamba") else set()
    assert noted.keys() == refused | read
    assert all("reads its weight" in noted[name] for name in read)
    assert all("peft refuses it" in noted[name] for name in refused)
    changed = {name.split(".")[-2] for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert "in_proj" in changed
    assert not changed & noted.keys()
    for name in sorted(noted):
        with pytest.raises(StepError, match=f"target_modules: {name} of this model cannot have an adapter: .*in_proj"):
            recover(model, repeated, tokenizer, target_modules=[name])


@pytest.mark.skipif(not pico.SCANS, reason="the scan of this transformers is not a function")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MIXERS)
def test_all_weights_of_a_cut_scan_are_trained(family, repeated, tokenizer):
    """A state of 0 in one layer, a narrower scan in another."""
    model = pico.pico(family)
    anatomy = pliant.anatomy_of(model)
    scans = [block for block in anatomy.blocks.values() if block.role == "scan"]
    subnet = pliant.Subnet().keeping(f"{scans[0].name}.state", 0)
    for axis in scans[-1].leaders:
        subnet = subnet.keeping(axis.name, axis.size // 2)
    model = pliant.apply(model, pliant.Cut(subnet=subnet, order="stored"), progress=False)
    before = weights(model)
    record = recover(model, repeated, tokenizer, method="full", learning_rate=3e-3)
    losses = [row["held_out"] for row in record["curve"] if row["held_out"] is not None]
    assert losses[-1] < losses[0]
    same = {name for name, tensor in weights(model).items() if tensor.numel() and torch.equal(tensor, before[name])}
    assert all(f".{scans[0].layer}." in name for name in same)  # step sizes of a scan that is gone
    assert {name.split(".")[4] for name in same} <= {"x_proj", "dt_proj", "dt_layernorm", "dt_bias", "A_log"}


@pytest.mark.parametrize("family", pico.DECODERS)
def test_adapters_are_on_every_linear_layer_of_the_blocks(family):
    model = cut(family)
    found = linear_layers(model, pliant.anatomy_of(model))
    inside = [name for name, module in model.named_modules() if ".3." in name and hasattr(module, "weight")]
    matrices = [name for name in inside if model.get_submodule(name).weight.dim() == 2]
    linears = (torch.nn.Linear, sys.modules["transformers.pytorch_utils"].Conv1D)
    assert {name for name in found if ".3." in name} == {
        n for n in matrices if isinstance(model.get_submodule(n), linears)
    }


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 2.0), (1.0, 2.0)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_the_whole_logits(family, weight, temperature, tokenizer):
    rows = [{"prompt": "ab", "completion": "cde" * 20}, {"prompt": "", "completion": SENTENCE * 4}]
    batch = pliant.examples(rows).encode(tokenizer, 200).batch([0, 1])
    model, dense = cut(family), pico.pico(family)
    ids, labels, mask = batch
    learned = labels[:, 1:] != IGNORED
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][learned]
    with torch.no_grad():
        theirs = dense(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][learned]
    text = F.cross_entropy(logits, labels[:, 1:][learned], reduction="sum")
    ours, expected = (logits / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1)
    divergence = (expected.exp() * (expected - ours)).sum() * temperature**2
    whole = (1 - weight) * text + weight * divergence
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    distillation = Distillation(Halves(dense), weight, temperature) if weight else None
    value = backward(Halves(model), batch, distillation)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_accumulating_is_one_large_batch_and_recomputing_changes_nothing(repeated, tokenizer):
    states = []
    for settings in ({}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}):
        model = cut()
        recover(model, repeated, tokenizer, method="full", dropout=0, **settings)
        states.append(weights(model))
    for other in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


def test_distillation_brings_the_predictions_to_those_of_the_dense_model(repeated, tokenizer):
    dense, model = pico.pico(), cut()
    before = pliant.evaluate(model, perplexity=repeated, reference=dense, seqlen=32, tokenizer=tokenizer)
    dense.train()
    recover(model, repeated, tokenizer, dense=dense, distillation_weight=1.0, method="full", steps=20, temperature=2.0)
    after = pliant.evaluate(model, perplexity=repeated, reference=dense, seqlen=32, tokenizer=tokenizer)
    assert after["perplexity"]["a list"]["kl"] < 0.7 * before["perplexity"]["a list"]["kl"]
    assert dense.training
    assert same(dense, weights(pico.pico()))


def test_the_dense_model_comes_from_where_the_model_was_loaded(folder, repeated, tokenizer, tmp_path):
    subnet = pliant.Subnet().without("layers.1.mlp")
    model, other = (pliant.apply(pliant.load(folder), pliant.Cut(subnet=subnet), progress=False) for _ in range(2))
    recover(model, repeated, None, distillation_weight=0.5)
    recover(other, repeated, tokenizer, distillation_weight=0.5, teacher=folder)
    assert same(model, weights(other))
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(StepError, match="same weights as the model to recover"):
        recover(pliant.load(tmp_path / "small"), repeated, tokenizer, distillation_weight=0.5)
    with pytest.raises(StepError, match="the dense model is unknown, because this model was not loaded"):
        recover(cut(), repeated, tokenizer, distillation_weight=0.5)
    with pytest.raises(StepError, match="vocabulary of 310, this model one of 300"):
        recover(cut(), repeated, tokenizer, distillation_weight=0.5, dense=pico.pico(vocab_size=310))


# stopping and going on


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("llama", "full"), ("gpt2", "full")])
def test_a_stopped_training_goes_on_to_the_identical_result(family, method, error, repeated, tokenizer, tmp_path):
    settings = {
        "method": method,
        "eval_steps": 4,
        "distillation_weight": 0.5,
        "dropout": 0.2,
    }  # gpt2 has dropout of its own
    dense, straight, broken = pico.pico(family), cut(family), cut(family)
    given = weights(broken)
    whole = recover(straight, repeated, tokenizer, dense=dense, **settings)
    with pytest.raises(error):
        recover(broken, repeated, tokenizer, dense=dense, work=tmp_path, progress=Stopping(3, error), **settings)
    assert same(broken, given)
    assert [path.name for path in next(tmp_path.glob("*-recover")).iterdir()] == ["state.safetensors"]
    made = []
    counting = type("Counting", (Progress,), {"step": lambda *_: made.append(1)})()
    resumed = recover(broken, repeated, tokenizer, dense=dense, work=tmp_path, progress=counting, **settings)
    assert len(made) == 3
    assert same(broken, weights(straight))
    assert [{**row, "seconds": 0} for row in resumed["curve"]] == [{**row, "seconds": 0} for row in whole["curve"]]


def test_stopped_in_the_middle_of_a_step_it_goes_on_from_the_last_look(repeated, tokenizer, tmp_path, monkeypatch):
    straight, broken = cut(), cut()
    recover(straight, repeated, tokenizer)
    right, calls = torch.optim.AdamW.step, []

    def failing(self, *args):
        calls.append(1)
        right(self, *args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        recover(broken, repeated, tokenizer, work=tmp_path)
    recover(broken, repeated, tokenizer, work=tmp_path)
    assert len(calls) == 4 + 4  # the state of step 2
    assert same(broken, weights(straight))


def test_a_finished_training_is_not_done_again(repeated, tokenizer, tmp_path):
    first, second = cut(), cut()
    recover(first, repeated, tokenizer, work=tmp_path)
    recover(second, repeated, tokenizer, work=tmp_path, progress=Stopping(1))
    assert same(second, weights(first))
    recover(second, repeated, tokenizer, work=tmp_path)  # a recipe may recover again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-recover", "3-recover"]


def test_a_state_of_another_training_is_refused(repeated, tokenizer, tmp_path):
    recover(cut(), repeated, tokenizer, work=tmp_path)
    for model, data, settings, told in [
        (cut(seed=1), repeated, {}, "model"),
        (cut(), pliant.text([SENTENCE] * 30), {}, "data"),
        (cut(), repeated, {"learning_rate": 1e-3}, "learning_rate: 0.005 in the file, 0.001 now"),
    ]:
        before = weights(model)
        with pytest.raises(ResumeError, match=rf"belongs to another training \(.*{told}.*Delete it"):
            recover(model, data, tokenizer, work=tmp_path, **settings)
        assert same(model, before)
    (state,) = tmp_path.glob("*-recover/state.safetensors")
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(ResumeError, match="damaged"):
        recover(cut(), repeated, tokenizer, work=tmp_path)


def test_a_time_budget_ends_at_the_first_step_past_it(repeated, tokenizer):
    record = recover(cut(), repeated, tokenizer, steps=100_000, minutes=0.01, eval_steps=1000)
    assert record["ended_by"] == "minutes"
    assert 0.6 <= record["seconds"] < 5
    assert 1 <= record["steps"] < 100_000
    assert record["curve"][-1]["step"] == record["steps"]


def test_minutes_alone_set_how_many_steps_there_are(repeated, tokenizer, capsys):
    record = recover(cut(), repeated, tokenizer, steps=None, minutes=0.02, eval_steps=1000, progress=True)
    assert record["ended_by"] == "minutes"
    assert record["steps"] > 6
    said = capsys.readouterr().err
    assert "steps of 4, 0.02 minutes" in said
    assert "the time is enough for about" in said
    assert "inf" not in said
    assert pliant.Recover(minutes=3)._most_steps() == math.inf
    assert pliant.Recover()._most_steps() == 200


def plan(**settings):
    given = {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 1.0}
    schedule = {"steps": 100, "warmup_ratio": 0.1, "lr_scheduler_type": "linear", "minutes": None, "eval_steps": 5}
    return Plan(**given | schedule | {"seed": 0} | settings)


def test_the_rate_goes_up_and_down_over_steps_or_time():
    rates = [plan().rate(plan().share(step, 0.0)) for step in range(100)]
    assert rates[9] < max(rates) == rates[10] < 1
    assert rates[0] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.005 / 0.9)
    assert plan(lr_scheduler_type="cosine").rate(0.55) == pytest.approx(0.5)
    assert plan(minutes=1).share(0, 30.0) == 0.5
    assert plan(minutes=1).rate(plan(minutes=1).share(0, 60.0)) == 0
    assert plan(minutes=1).over(3, 61.0) == "minutes"
    assert plan(warmup_ratio=0.0).rate(0.0) == 1


def test_every_pass_takes_every_sequence_once_in_another_order(repeated, tokenizer):
    model = pico.pico()
    data = pliant.examples(repeated).encode(tokenizer, 32)
    training = Training(
        model, Halves(model), dict(model.named_parameters()), data, data.take([]), plan(), None, None, Progress()
    )
    rows = [row for step in range(len(data)) for row in training._rows(step)]
    passes = [rows[start : start + len(data)] for start in range(0, 4 * len(data), len(data))]
    assert all(sorted(one) == list(range(len(data))) for one in passes)
    assert passes[0] != passes[1]
    assert training._rows(3) == rows[12:16]  # whatever was asked for before


# what cannot be done


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_no_number_is_an_error_and_the_model_stays(method, repeated, tokenizer, tmp_path, monkeypatch):
    model = cut()
    before, kinds = weights(model), [type(module) for module in model.modules()]
    monkeypatch.setattr("pliant.train.loop.backward", lambda *_: torch.tensor(math.nan))
    with pytest.raises(DivergedError, match=r"step 1 is nan.*learning_rate below 0\.005"):
        recover(model, repeated, tokenizer, method=method, work=tmp_path)
    assert same(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert not model.training
    assert not hasattr(model, "peft_config")


def test_an_interrupted_merge_is_undone(repeated, tokenizer, monkeypatch):
    from peft.tuners.lora import Linear

    model = cut()
    before, merge, calls = weights(model), Linear.merge, []

    def failing(self, *args, **kwargs):
        calls.append(merge(self, *args, **kwargs))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Linear, "merge", failing)
    with pytest.raises(KeyboardInterrupt):
        recover(model, repeated, tokenizer)
    assert same(model, before)


def test_every_setting_has_a_help_text_and_can_be_written_down():
    step = pliant.Recover(data="some.txt", learning_rate=1e-3)
    assert set(settings_of(pliant.Recover)) == {field.name for field in dataclasses.fields(step)}
    assert json.loads(json.dumps(step.to_dict()))["learning_rate"] == 1e-3


def test_settings_that_cannot_be_are_refused():
    for settings, told in [
        ({"method": "qlora"}, "method must be one of lora, full; not 'qlora'"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type must be one of linear, cosine; not 'step'"),
        ({"gradient_checkpointing": "small"}, "gradient_checkpointing must be true or false; not 'small'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, or none; not 0"),
        ({"seqlen": 1}, "seqlen must be a whole number of at least 2"),
        ({"micro_batch_size": 2.5}, "micro_batch_size must be a whole number"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"minutes": math.nan}, "minutes must be a number above 0"),
        ({"distillation_weight": 1.5}, "distillation_weight must be a number from 0 to 1"),
        ({"warmup_ratio": 1}, "warmup_ratio must be a number from 0 to 0.9"),
    ]:
        with pytest.raises(StepError, match=told):
            pliant.Recover(**settings)


def test_names_of_layers_are_a_list_or_a_text_with_commas():
    expected = pliant.Recover(target_modules=("q_proj", "v_proj"))
    assert expected.target_modules == ("q_proj", "v_proj")
    assert expected == pliant.Recover(target_modules=["q_proj", "v_proj"])
    assert [expected] == recipe(["recover"], {}, ["target_modules=q_proj, v_proj"])
    assert expected == pliant.step_of(json.loads(json.dumps(expected.to_dict())))
    with pytest.warns(FormerNameWarning, match="targets is now target_modules"):
        assert expected == pliant.step_of({"step": "recover", "targets": "q_proj,v_proj"})
    for everything in (None, "", (), []):
        assert pliant.Recover(target_modules=everything) == pliant.Recover()
    for wrong in (3, [3], {"q_proj"}):
        with pytest.raises(StepError, match="target_modules must be a list of names"):
            pliant.Recover(target_modules=wrong)


def test_what_cannot_be_trained_is_refused(repeated, tokenizer, model):
    def refused(error, told, of, data, **settings):
        before = weights(of)
        with pytest.raises(error, match=told):
            recover(of, data, tokenizer, **settings)
        assert same(of, before)

    refused(DataError, "needs data", model, None)
    refused(DataError, "longer than the 256 positions", model, repeated, seqlen=512)
    refused(DataError, "one window needs 200", model, pliant.text(["short"]), seqlen=200)
    refused(DataError, "set held_out=0", model, pliant.text(["x" * 40]))
    refused(DataError, "tokenizer of another model", pico.pico(vocab_size=50), repeated)
    refused(
        StepError,
        "unknown linear layer 'qkv'; choose from: down_proj, gate_proj",
        model,
        repeated,
        target_modules="q_proj, qkv",
    )
    refused(ArchitectureError, "predicts no next tokens", pico.pico("bert"), repeated)
    broken = pico.pico()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.inf
    with pytest.raises(WeightError):
        recover(broken, repeated, tokenizer)


def test_without_peft_full_works_and_lora_says_what_to_install(repeated, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = cut()
    before = weights(model)
    with pytest.raises(PliantError, match=r"pip install 'pliant\[train\]'; or choose method full"):
        recover(model, repeated, tokenizer)
    assert same(model, before)
    assert recover(model, repeated, tokenizer, method="full")["steps"] == 6


def test_adapters_only_where_asked(repeated, tokenizer):
    model = cut()
    before = weights(model)
    recover(model, repeated, tokenizer, target_modules=["q_proj", "v_proj"])
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}


# in the whole


def test_examples_of_its_own_leave_the_calibration_text_to_the_pruner(repeated, tokenizer, tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = pico.pico()
    steps = [pliant.BlockPruner(ratio=0.1, samples=4, seqlen=32), pliant.Recover(**QUICK, data=tmp_path / "sums.jsonl")]
    pliant.apply(model, steps, repeated, tokenizer=tokenizer, work=tmp_path / "work", progress=False)
    assert [step["settings"]["step"] for step in model.pliant_history] == ["blockpruner", "recover"]
    assert model.pliant_history[1]["recovery"]["sequences"] == 36
    alone = pliant.apply(
        cut(), pliant.Recover(**QUICK), pliant.examples(rows), tokenizer=tokenizer, progress=False
    ).pliant_history[-1]
    assert alone["data"]["rows"] == 40


def test_compress_recovers_and_goes_on_after_ctrl_c(folder, prose, tmp_path):
    recipe = [
        pliant.BlockPruner(ratio=0.2, samples=8, seqlen=32),
        pliant.Recover(**QUICK | {"steps": 12, "eval_steps": 3}, distillation_weight=0.5, method="full"),
    ]
    measuring = Measuring(seqlen=32, windows=4, speed=False)
    whole = compress(folder, recipe, prose, tmp_path / "whole", measuring=measuring, progress=Progress())
    out = tmp_path / "small"

    class Interrupting(Progress):
        def step(self, done, text):  # noqa: ARG002
            if text.startswith("step 8 "):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(folder, recipe, prose, out, measuring=measuring, progress=Interrupting())
    again = compress(folder, recipe, prose, out, measuring=measuring, progress=Progress())
    (before,) = again["before"]["quality"]["perplexity"].values()
    (after,) = again["after"]["quality"]["perplexity"].values()
    assert after["perplexity"] < before["perplexity"]  # these models were never trained
    assert again["after"]["quality"] == whole["after"]["quality"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_compress_keeps_the_state_that_it_refuses_to_mix(folder, prose, tmp_path):
    measuring = Measuring(seqlen=32, windows=4, speed=False)
    step = pliant.Recover(**QUICK, method="full")
    with pytest.raises(RuntimeError):
        compress(folder, step, prose, tmp_path / "small", measuring=measuring, progress=Stopping(3))
    other = pliant.Recover(**QUICK | {"learning_rate": 1e-3}, method="full")
    with pytest.raises(ResumeError):
        compress(folder, other, prose, tmp_path / "small", measuring=measuring, progress=Progress())
    assert (tmp_path / "small.work" / "1-recover" / "state.safetensors").exists()
    compress(folder, step, prose, tmp_path / "small", measuring=measuring, progress=Progress())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_goes_on_to_the_identical_result(method, folder, prose, tmp_path):
    program = f"""
import torch, pliant
torch.set_num_threads(1)
model = pliant.load({str(folder)!r})
step = pliant.Recover(method={method!r}, steps=60, seqlen=32, batch_size=4, eval_steps=2,
                      learning_rate=5e-3, distillation_weight=0.5)
pliant.apply(model, pliant.Cut(subnet=pliant.Subnet().without("layers.1.mlp")), progress=False)
pliant.apply(model, step, {str(prose)!r}, work=WORK, progress=False)
model.save_pretrained(OUT)
"""

    def run(work, out):
        exec(program, {"WORK": str(tmp_path / work), "OUT": str(tmp_path / out)})

    run("w1", "straight")
    state = tmp_path / "w2" / "2-recover" / "state.safetensors"
    for _ in range(2):
        names = f"WORK, OUT = {str(tmp_path / 'w2')!r}, {str(tmp_path / 'broken')!r}"
        process = subprocess.Popen([sys.executable, "-c", names + program], stderr=subprocess.DEVNULL)
        since = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns < since + 100_000_000):
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "broken").exists()
    run("w2", "broken")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("straight", "broken"))
    assert whole.read_bytes() == resumed.read_bytes()
