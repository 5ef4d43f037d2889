"""Mamba-Shedder: blocks, scans and their parts, in one pool and in stages, against the paper's loop by hand."""

import importlib
import json

import pytest
import torch
import transformers
from torch.nn import functional
from typer.testing import CliRunner

import pliant
from pico import IDS, SCANS, logits, pico, tokenizer
from pliant.anatomy import anatomy_of, layers_of
from pliant.architecture import catalogue
from pliant.cli.main import app
from pliant.compat.scan import watched_scans
from pliant.elastic import Elastic, Subnet, extract, parameters
from pliant.errors import ArtefactError, DataError, PliantError, RatioError, StepError
from pliant.forward.windows import windows_for
from pliant.measure.cost import cost_of
from pliant.measure.speed.latency_table import measure_latency
from pliant.prune.imported_configs import parse_config
from pliant.prune.scan_skip import scan_axis, scans_of, with_skips
from pliant.prune.targets import PARTS, axes_of
from pliant.run.compress import compress
from pliant.run.recipe import Measuring
from pliant.step import Job

pytestmark = pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function")
TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
ROWS = {"samples": 8, "seqlen": 32}
FAMILIES = tuple(name for name, of in catalogue().items() if any(block.skip for block in of.blocks))


def shed(model, data=TEXT, **settings):
    step = pliant.MambaShedder(**{**ROWS, **settings})
    small = pliant.apply(model, step, data, tokenizer=tokenizer(), progress=False)
    return small, small.pliant_history[-1]


def job_of(model):
    return Job(model, tokenizer, lambda: model, TEXT, None, pliant.progress.Progress())


def windows_of(model, samples=8, seed=42):
    return windows_for(model, tokenizer(), TEXT.sample(samples, seed), 32)


@torch.inference_mode()
def loss_of(model, windows):
    out = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(out.flatten(0, 1).double(), windows[:, 1:].flatten()).item()


# The paper's loop


@pytest.mark.parametrize(
    ("family", "target"),
    [("mamba", "block"), ("mamba", "ssm"), ("mamba2", "block+ssm"), ("bamba", "block+attention+mlp"), ("bamba", "ssm")],
)
def test_the_removals_are_those_of_the_papers_loop(family, target):
    model = pico(family)
    anatomy, windows = anatomy_of(model), windows_of(model)
    roles = {"block": {"scan"}, "attention": {"attention"}, "mlp": {"mlp"}}
    elastic, subnet, by_hand = Elastic(model, anatomy), Subnet(), []
    for _ in range(3 if family == "mamba2" else 2):
        offered = {}
        for block in anatomy.may_go(subnet.skip) if target != "ssm" else ():
            if any(block.role in roles.get(name, ()) for name in target.split("+")):
                offered[block.name] = subnet.without(block.name)
        for block in anatomy.alive(subnet.skip) if "ssm" in target else ():
            if (axis := scan_axis(block)) is not None and dict(subnet.keep).get(axis.name) != 0:
                offered[f"{block.name}.ssm"] = subnet.keeping(axis.name, 0)
        losses = {}
        for unit, candidate in offered.items():
            elastic.activate(candidate)
            losses[unit] = loss_of(model, windows)
        by_hand.append(min(losses, key=losses.__getitem__))
        subnet = offered[by_hand[-1]]
    elastic.activate(Subnet())
    _, record = shed(model, target=target, steps=len(by_hand), search="exact")
    assert [point["unit"] for point in record["points"]] == by_hand
    assert Subnet.from_dict(record["subnet"]) == subnet
    assert record["points"][-1]["loss"] == pytest.approx(losses[by_hand[-1]], abs=1e-5)


def test_stages_remove_one_kind_after_the_other():
    small, record = shed(pico("bamba"), stages="block+attention+mlp:2, channels:3, ssm:1", mlp_group=8)
    stages = [point["stage"] for point in record["points"]]
    assert stages == ["block+attention+mlp"] * 2 + ["channels"] * 3 + ["ssm"]
    kept = record["subnet"]["keep"]
    assert sum(48 - units for axis, units in kept.items() if axis.endswith("channels")) == 24
    assert sum(axis.endswith("state") and units == 0 for axis, units in kept.items()) == 1
    assert len(record["subnet"]["skip"]) == 2
    assert parameters(anatomy_of(small)) == record["points"][-1]["parameters"]


def test_ratios_of_stages_add_up_and_excess_is_put_back():
    model = pico("nemotron_h")
    anatomy = anatomy_of(model)
    small, record = shed(model, stages="mlp+block:0.2, channels:0.03, ssm:0.02", mlp_group=4)
    assert 0.25 <= record["ratio"] < 0.25 + _smallest(anatomy) / parameters(anatomy)
    assert [*record["counters"]][:3] == ["mlp+block", "channels", "ssm"]
    assert parameters(anatomy_of(small)) == parameters(anatomy, Subnet.from_dict(record["subnet"]))


def _smallest(anatomy):
    scans = (Subnet().keeping(scan_axis(block).name, 0) for block in scans_of(anatomy))
    return max(parameters(anatomy) - parameters(anatomy, subnet) for subnet in scans)


@pytest.mark.parametrize("ratio_of", ["macs", "bytes"])
def test_a_ratio_of_another_cost_is_reached(ratio_of):
    model = pico("mamba2")
    cost = cost_of(ratio_of, pico("mamba2"), anatomy_of(model))
    _, record = shed(model, target="heads+state", state_group=2, ratio=0.1, ratio_of=ratio_of)
    removed = 1 - cost(Subnet.from_dict(record["subnet"])) / cost(Subnet())
    assert removed == pytest.approx(record["removed"]["ratio"])
    assert 0.1 <= removed < 0.13
    assert f"Removed of {ratio_of}" in json.dumps(record["sections"])


def test_a_ratio_of_milliseconds_is_one_of_the_measured_table(monkeypatch):
    monkeypatch.setattr("pliant.measure.speed.latency_table._milliseconds", _by_parameters)
    model = pico("mamba2")
    anatomy = anatomy_of(model)
    table = measure_latency(model, anatomy, "decode", repeats=1)
    _, record = shed(model, target="block+ssm", ratio=0.2, ratio_of="decode", per="decode")
    subnet = Subnet.from_dict(record["subnet"])
    assert record["removed"] == {
        "of": "decode",
        "ratio": pytest.approx(1 - table.of(anatomy, subnet) / table.of(anatomy), abs=1e-5),  # the file rounds
    }
    assert record["removed"]["ratio"] >= 0.2 - 1e-5
    without = Subnet().keeping("layers.0.mamba.state", 0)
    gained = (parameters(anatomy) - parameters(anatomy, without)) / 1e3
    assert table.of(anatomy) - table.of(anatomy, without) == pytest.approx(gained)  # the rest of the block takes time


def _by_parameters(model, _ids):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e3


def test_models_of_which_some_blocks_have_no_scan_are_measured(monkeypatch):
    monkeypatch.setattr("pliant.measure.speed.latency_table._milliseconds", _by_parameters)
    model = pico("mamba2")
    extract(model, anatomy_of(model), Subnet().keeping("layers.3.mamba.state", 0))
    anatomy = anatomy_of(model)
    table = measure_latency(model, anatomy, "decode", repeats=1)
    assert table.axes["mamba", "state"][0][1] > 0  # measured on the blocks that have a scan
    assert table.of(anatomy) > 0


@pytest.mark.parametrize(
    ("family", "target", "size", "removed"),
    [
        ("mamba2", "heads", 8, 8),
        ("mamba2", "state", 10, 10),
        ("mamba2", "groups", 2, 2),
        ("mamba", "scan_channels", 64, 16),
        ("jamba", "scan_channels", 96, 16),
        ("bamba", "channels", 48, 16),
        ("qwen3_5_text", "groups", 3, 2),
    ],
)
def test_parts_are_removed_in_their_groups(family, target, size, removed):
    settings = {"mlp_group": 8, "head_group": 2, "state_group": 5, "order": "activation"}
    _, record = shed(pico(family), target=target, steps=2, **settings)
    assert sum(size - units for units in record["subnet"]["keep"].values()) == removed


def test_every_part_of_a_model_is_one_target_at_most():
    step = pliant.MambaShedder(steps=1)
    for family in (*FAMILIES, "qwen3_next", "kimi_linear", "lfm2", "mixtral"):
        anatomy = anatomy_of(pico(family))
        named = [axis.name for target in PARTS for axis in axes_of(anatomy, target)]
        assert len(named) == len(set(named))
        scans = {block.name for block in anatomy.blocks.values() if block.role == "scan"}
        assert scans <= {name.rpartition(".")[0] for name in named}
    assert step.searches() == [((), 1, None)]


# What remains of a scan


def scale_of(skip, model, block):
    own = layers_of(model, anatomy_of(model).source)[block.layer].get_submodule(block.spec.module).D
    if skip == "identity":
        return torch.ones_like(own)
    anatomy = with_skips(job_of(model), anatomy_of(model), skip, IDS)
    alone = next(weight.alone for weight in anatomy.blocks[block.name].weights if weight.skips)
    return own.detach() if alone is None else alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", ["kept", "identity", "fitted"])
def test_a_removed_scan_returns_its_input_times_the_skip(family, skip):
    model = pico(family)
    anatomy = anatomy_of(model)
    block = scans_of(anatomy)[-1]
    scale = scale_of(skip, model, block)
    subnet = Subnet().keeping(scan_axis(block).name, 0)
    module = importlib.import_module(type(model).__module__)
    name = "mamba2_chunk_scan" if hasattr(module, "mamba2_chunk_scan") else "mamba_selective_scan"
    mixer = layers_of(model, anatomy.source)[block.layer].get_submodule(block.spec.module)
    original, running = getattr(module, name), []

    def by_hand(x, *rest, **settings):
        if not running:
            return original(x, *rest, **settings)
        y = x * (scale[:, None] if name == "mamba2_chunk_scan" else scale[None, :, None])
        return y if settings.get("z") is None else y * functional.silu(settings["z"])

    handles = [
        mixer.register_forward_pre_hook(lambda *_: running.append(1)),
        mixer.register_forward_hook(lambda *_: running.clear()),
    ]
    setattr(module, name, by_hand)
    try:
        expected = logits(model)
    finally:
        setattr(module, name, original)
        for handle in handles:
            handle.remove()
    with_skip = with_skips(job_of(model), anatomy, skip, IDS)
    elastic = Elastic(model, with_skip)
    elastic.activate(subnet)
    activated = logits(model)
    elastic.activate(Subnet())
    extract(model, with_skip, subnet)
    assert torch.equal(logits(model), activated)
    torch.testing.assert_close(activated, expected, rtol=1e-5, atol=1e-5)
    others = [b for b in anatomy_of(model).blocks.values() if b.role == "scan" and b.name != block.name]
    dense = pico(family)
    for other in others:  # layers whose scan stays keep their D
        before = layers_of(dense, anatomy.source)[other.layer].get_submodule(other.spec.module).D
        after = layers_of(model, anatomy.source)[other.layer].get_submodule(other.spec.module).D
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fitted_skip_is_nearer_to_the_scan_than_its_d_and_one(family):
    model = pico(family)
    anatomy = anatomy_of(model)
    scans, errors, seen = scans_of(anatomy), {}, []
    scales = {
        skip: [scale_of(skip, model, block).double() for block in scans] for skip in ("kept", "identity", "fitted")
    }

    def watch(x, y):
        for skip, of_blocks in scales.items():
            error = (y.double() - of_blocks[len(seen)][:, None] * x.double()).square().sum((0, 1, 3))
            errors.setdefault(skip, []).append(error)
        seen.append(1)

    with watched_scans(watch):
        logits(model)
    assert len(seen) == len(scans)
    for fitted, kept, identity in zip(errors["fitted"], errors["kept"], errors["identity"], strict=True):
        assert (fitted <= kept).all()
        assert (fitted <= identity).all()
        assert fitted.sum() < 0.999 * min(kept.sum(), identity.sum())


def test_scores_of_the_search_use_the_skip():
    points = {}
    for skip in ("kept", "identity", "fitted"):
        small, record = shed(pico("mamba2"), target="ssm", steps=1, skip=skip)
        points[skip] = record["points"][0]["loss"]
        assert points[skip] == pytest.approx(loss_of(small, windows_of(small)), abs=1e-5)
        assert "Scans removed: 1" in json.dumps(record["sections"])
    assert len(set(points.values())) == 3


def test_skips_are_fitted_to_the_order_of_the_heads():
    model = pico("mamba2")
    before = logits(model)
    small, record = shed(model, stages="heads:1, ssm:2", skip="fitted", head_group=1)
    assert record["points"][-1]["loss"] == pytest.approx(loss_of(small, windows_of(small)), abs=1e-5)
    with pytest.raises(StepError):
        shed(pico("mamba2"), target="ssm", steps=9, skip="fitted")
    assert before.isfinite().all()


@pytest.mark.parametrize("skip", ["identity", "fitted"])
def test_a_folder_holds_the_skip_and_a_decoding_step_equals_a_full_forward(skip, tmp_path):
    small, _ = shed(pico("mamba"), stages="ssm:2, block:1", skip=skip)
    pliant.save(small, tmp_path / "small")
    again = pliant.load(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    same = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, full = (small.generate(IDS, use_cache=cache, **same) for cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=1e-4, atol=1e-4)


def test_a_search_that_was_stopped_resumes_equal(folder_of_mamba, tmp_path):
    step = pliant.MambaShedder(target="block+ssm", steps=3, skip="fitted", **ROWS)

    class Stopping(pliant.progress.Progress):
        count = 0

        def emit(self, event, **_):
            if event == "step":
                self.count += 1
            if self.count > 8:
                raise KeyboardInterrupt

    def run(name, progress):
        measuring = Measuring(seqlen=32, windows=2, speed=False)
        return compress(folder_of_mamba, step, TEXT, tmp_path / name, measuring=measuring, progress=progress)

    run("whole", pliant.progress.Progress())
    with pytest.raises(KeyboardInterrupt):
        run("small", Stopping())
    report = run("small", pliant.progress.Progress())
    assert sum(of["replayed"] for of in report["steps"][0]["counters"].values()) > 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def folder_of_mamba(tmp_path):
    pico("mamba2").save_pretrained(tmp_path / "mamba2")
    tokenizer().save_pretrained(tmp_path / "mamba2")
    return tmp_path / "mamba2"


def test_the_command_line_counts_steps_and_plans_the_recipe(folder_of_mamba, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT.rows), "utf-8")
    settings = ("samples=8", "seqlen=32", "stages=block:1, ssm:2", "skip=identity")
    words = ["compress", str(folder_of_mamba), "--system", "mamba_shedder", "--data", str(tmp_path / "text.txt")]
    words += ["--out", str(tmp_path / "small"), "--no-speed", "--windows", "2"]
    words += [word for pair in settings for word in ("--set", pair)]
    runner = CliRunner(env={"NO_COLOR": "1"})
    outcome = runner.invoke(app, words, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "1-mamba_shedder" in [stage["stage"] for stage in pliant.plan(tmp_path / "small")["stages"]]
    few, many = (pliant.MambaShedder(steps=steps).estimate(8, 30)[0] for steps in (1, 4))
    assert 0 < few < many
    shown = (tmp_path / "small" / "README.md").read_text("utf-8")
    assert "Scans removed: 2. In their place x is multiplied by 1." in shown
    with pytest.raises(StepError, match="exactly one of steps"):
        runner.invoke(app, [*words[:-8], "--set", "target=ssm", "--overwrite"], catch_exceptions=False)
    cut = ["--subnet", str(_config(tmp_path)), "--out", str(tmp_path / "cut")]
    outcome = runner.invoke(app, ["compress", str(folder_of_mamba), *cut, "--no-speed"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert (pliant.load(tmp_path / "cut").backbone.layers[1].mixer.D == 1).all()


def _config(folder):
    path = folder / "pruning_config.json"
    path.write_text(json.dumps({"pruned_mamba_block_idx": [], "pruned_ssm_idx": [1]}), "utf-8")
    return path


# The published configurations

MAMBA_BLOCKS = [2, 6, 12, 5, 10, 8, 13, 11, 26, 48, 19, 55, 15, 3]
MAMBA2_SCANS = [63, 54, 42, 45, 53, 57, 58, 59, 38, 56, 50, 61, 60, 43, 37, 62, 49, 34, 55, 33, 39, 35, 44, 46]
WIDTH, INNER, STATE, KERNEL = 2560, 5120, 128, 4  # of both models; Mamba-1 has a state of 16


def on_meta(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_the_published_blocks_of_mamba_2_8b_leave_the_parameters_that_they_should():
    rank, state, vocabulary = 160, 16, 50280
    config = transformers.MambaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=64, state_size=state, time_step_rank=rank
    )
    anatomy = anatomy_of(on_meta(config))
    block = WIDTH + WIDTH * 2 * INNER + INNER * (KERNEL + 1) + INNER * (rank + 2 * state)
    block += INNER * (rank + 1) + INNER * state + INNER + INNER * WIDTH
    assert parameters(anatomy) == 64 * block + vocabulary * WIDTH + WIDTH
    subnet = parse_config({"pruned_mamba_block_idx": MAMBA_BLOCKS, "pruned_ssm_idx": []}, anatomy)
    assert parameters(anatomy) - parameters(anatomy, subnet) == len(MAMBA_BLOCKS) * block
    scan = parse_config({"pruned_ssm_idx": [5]}, anatomy)
    x_proj, dt_proj, a_log = INNER * (rank + 2 * state), INNER * (rank + 1), INNER * state
    assert parameters(anatomy) - parameters(anatomy, scan) == x_proj + dt_proj + a_log


def test_the_published_scans_of_mamba2_2_7b_leave_the_parameters_that_they_should():
    heads, groups, vocabulary = 80, 1, 50288
    config = transformers.Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=64,
        state_size=STATE,
        num_heads=heads,
        head_dim=64,
        n_groups=groups,
        expand=2,
        tie_word_embeddings=True,
    )
    anatomy = anatomy_of(on_meta(config))
    subnet = parse_config({"pruned_ssm_idx": MAMBA2_SCANS}, anatomy)
    states = 2 * groups * STATE
    scan = (states + heads) * WIDTH  # the rows of in_proj that give B, C and dt: 336 of 10,576
    scan += states * (KERNEL + 1) + 2 * heads  # channels of the convolution and their bias; A_log and dt_bias
    assert parameters(anatomy) - parameters(anatomy, subnet) == len(MAMBA2_SCANS) * scan


def test_a_configuration_of_the_original_code_returns_the_input_of_a_removed_scan():
    model = pico("mamba2")
    raw = {"pruned_mamba_block_idx": [2], "pruned_ssm_idx": [0, 2, 3]}
    small = pliant.apply(pico("mamba2"), pliant.Cut(subnet=raw), progress=False)
    record = small.pliant_history[-1]
    assert Subnet.from_dict(record["subnet"]) == Subnet(
        frozenset({"layers.2.mamba"}), (("layers.0.mamba.state", 0), ("layers.3.mamba.state", 0))
    )
    assert "multiplied by 1" in json.dumps(record["sections"])
    assert (small.backbone.layers[0].mixer.D == 1).all()
    assert torch.equal(small.backbone.layers[1].mixer.D, model.backbone.layers[1].mixer.D)
    kept = pliant.apply(pico("mamba2"), pliant.Cut(subnet=raw, skip="kept"), progress=False)
    assert torch.equal(kept.backbone.layers[0].mixer.D, model.backbone.layers[0].mixer.D)
    with pytest.raises(DataError, match="skip='fitted' need"):
        pliant.apply(model, pliant.Cut(subnet=raw, skip="fitted"), progress=False)
    cut = pliant.Cut(subnet=raw, skip="fitted", **ROWS)
    fitted = pliant.apply(model, cut, TEXT, tokenizer=tokenizer(), progress=False)
    assert not (fitted.backbone.layers[0].mixer.D == 1).any()


def test_a_configuration_of_a_hybrid_is_read():
    anatomy = anatomy_of(pico("bamba"))
    raw = {"pruned_mamba_block_idx": [0], "pruned_mha_idx": [1], "pruned_mlp_idx": [2], "pruned_ssm_idx": [2]}
    subnet = parse_config({**raw, "pruned_mlp_channels": {"3": 40}}, anatomy)
    assert subnet.skip == {"layers.0.mamba", "layers.1.attention", "layers.2.mlp"}
    assert dict(subnet.keep) == {"layers.2.mamba.state": 0, "layers.3.mlp.channels": 40}


@pytest.mark.parametrize(
    ("family", "raw", "refusal"),
    [
        ("bamba", {"pruned_ssm_idx": [0], "pruned_foo": [2]}, "unknown key 'pruned_foo'; known are"),
        ("bamba", {"pruned_hymba_block_idx": [1]}, "Hymba, a family that transformers does not have"),
        ("bamba", {"pruned_moe_idx": [1], "pruned_ssm_idx": []}, "Hymba"),
        ("bamba", {"pruned_ssm_idx": [0.5]}, "whole numbers, not 0.5"),
        ("bamba", {"pruned_mlp_idx": [True]}, "whole numbers, not True"),
        ("bamba", {"pruned_mlp_channels": {"0": 24.7}}, "whole numbers, not 24.7"),
        ("bamba", {"keep": {"layers.0.mamba.state": 0.5}}, "whole number, not 0.5"),
        ("bamba", {"pruned_ssm_idx": [1]}, "layer 1 has 0 blocks of the role scan"),
        ("llama", {"pruned_ssm_idx": [1]}, "layer 1 has 0 blocks of the role scan"),
        ("mamba", {"pruned_mamba_block_idx": [0, 1, 2, 3]}, "at least one must stay"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(family, raw, refusal):
    with pytest.raises(DataError, match=refusal):
        parse_config(raw, anatomy_of(pico(family)))


def test_repair_refits_around_a_fitted_skip():
    model = pico("mamba2")
    small, record = shed(pico("mamba2"), target="ssm", steps=1, skip="fitted", repair=8)
    (name,) = record["subnet"]["keep"]
    layer = int(name.split(".")[1])
    assert not torch.equal(small.backbone.layers[layer].mixer.D, model.backbone.layers[layer].mixer.D)
    assert any(fit["distance"] is not None for fit in record["repair"])


# Refusals


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({}, "exactly one of steps"),
        ({"steps": 2, "ratio": 0.1}, "exactly one of steps"),
        ({"stages": "ssm:2", "steps": 2}, "exactly one of steps"),
        ({"stages": "ssm:2", "target": "ssm"}, "leave target out"),
        ({"steps": 2, "target": "scan"}, "unknown target 'scan'; choose from: channels, heads"),
        ({"steps": 2, "target": "ssm+"}, "unknown target ''"),
        ({"steps": 2, "target": "ssm+ssm"}, r"ssm comes twice in 'ssm\+ssm'"),
        ({"stages": "ssm:2, block+ssm:1"}, "ssm comes twice"),
        ({"stages": ""}, "a stage is written as targets:amount"),
        ({"stages": "ssm:2,,block:1"}, "a stage is written as targets:amount .* not ''"),
        ({"stages": "ssm"}, "not 'ssm'"),
        ({"stages": "ssm:0"}, "not 'ssm:0'"),
        ({"stages": "ssm:1.5"}, "not 'ssm:1.5'"),
        ({"stages": "ssm:nan"}, "not 'ssm:nan'"),
        ({"stages": "ssm:many"}, "not 'ssm:many'"),
        ({"stages": ":3"}, "not ':3'"),
        ({"stages": "ssm:0.6, block:0.5"}, "add up to less than 1"),
        ({"steps": 2, "skip": "none"}, "skip must be one of kept, identity, fitted"),
    ],
)
def test_settings_that_contradict_are_refused(settings, refusal):
    with pytest.raises(StepError, match=refusal):
        pliant.MambaShedder(**settings)


@pytest.mark.parametrize(
    ("family", "settings", "refusal"),
    [
        (
            "llama",
            {"target": "block", "steps": 1},
            "needs a block with a scan .* llama model has none; choose from: ch",
        ),
        ("llama", {"target": "ssm", "steps": 1}, "needs a scan of which a skip alone can remain"),
        (
            "mamba",
            {"target": "heads", "steps": 1},
            "needs scan heads, and this mamba .* state, scan_channels, ssm, block",
        ),
        ("mamba2", {"target": "attention", "steps": 1}, "needs an attention block"),
        (
            "qwen3_5_text",
            {"target": "ssm", "steps": 1},
            "a scan of which a skip alone can remain, and this qwen3_5_text",
        ),
        ("mamba", {"target": "block", "steps": 4}, "block: 4 removals are more than there can be; give at most 3"),
        ("mamba2", {"target": "ssm", "steps": 5}, "give at most 4"),
        ("mamba2", {"target": "ssm+block", "steps": 8}, "give at most 7"),
        ("bamba", {"stages": "attention:1, mlp:5"}, "mlp: 5 removals .* at most 4"),
        ("bamba", {"target": "attention", "steps": 2}, "at most 1"),
        ("mamba2", {"target": "state", "state_group": 3, "steps": 1}, "10 units and cannot be narrowed in groups of 3"),
        ("mamba2", {"target": "heads", "head_group": 3, "steps": 1}, "groups of 6; give another head_group"),
        ("bamba", {"target": "channels", "mlp_group": 48, "steps": 1}, "groups of 48; give another mlp_group"),
    ],
)
def test_more_than_the_model_has_is_refused_and_nothing_changes(family, settings, refusal):
    model = pico(family)
    before = logits(model)
    with pytest.raises(StepError, match=refusal):
        shed(model, **settings)
    assert torch.equal(logits(model), before)


def test_a_ratio_that_the_scans_do_not_have_is_refused():
    with pytest.raises(RatioError, match="cannot be reached: removing everything"):
        shed(pico("mamba2"), target="ssm", ratio=0.5)
    with pytest.raises(RatioError, match="cannot be reached: removing everything"):
        shed(pico("mamba2"), stages="block:0.1, ssm:0.5")


def test_removals_that_run_out_are_refused_with_the_number_made():
    model = pico("mamba2")
    before = logits(model)
    with pytest.raises(RatioError, match="ssm: no moves are left at 1 of 3 removed"):
        shed(model, stages="block:3, ssm:3")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "script"),
    [
        ({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}}, "convert_mamba_ssm"),
        ({"d_model": 768, "n_layer": 24, "ssm_cfg": {"layer": "Mamba2"}}, "convert_mamba2_ssm"),
    ],
)
def test_a_checkpoint_of_the_original_package_is_named(config, script, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    torch.save({"backbone.layers.0.mixer.in_proj.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match=f"checkpoint of the mamba_ssm package.*'-hf'.*{script}"):
        pliant.load(tmp_path)
    with pytest.raises(PliantError, match="checkpoint of the mamba_ssm package"):
        compress(tmp_path, pliant.MambaShedder(steps=1), TEXT, tmp_path / "small")
