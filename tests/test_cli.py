import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import typer
from filelock import FileLock
from typer.testing import CliRunner

import pliant
from pico import pico
from pliant.cli import main
from pliant.cli.doctor import diagnose
from pliant.cli.main import app
from pliant.cli.step_options import known_subnet, recipe
from pliant.elastic import Subnet
from pliant.errors import ArtefactError, DataError, PliantError, RatioError, StepError, WeightError
from pliant.prune import Cut
from pliant.registry import IMPORTANCE, SCORES, SEARCHES, STEPS
from pliant.step import FormerNameWarning, settings_of, step_class
from pliant.strict_json import to_json

VERBS = typer.main.get_command(app).commands
STRICT = ("-W", "error", "-W", "ignore::DeprecationWarning")  # what packages below use of others is theirs


def run(*words):
    """One verb in this process; whatever it raises is raised."""
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner(env=plain).invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def entry(monkeypatch, capsys):
    """The program as a shell sees it: exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pliant", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        shown = capsys.readouterr()
        return exit_.value.code or 0, shown.out, shown.err

    return call


@pytest.fixture
def task(tmp_path):
    rows = [{"context": f"{i}", "choices": ["yes", "no, not ever"], "answer": i % 2} for i in range(6)]
    path = tmp_path / "yes-no.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


# what is light stays light

LIGHT = """
import sys
try:
    from pliant.cli import main
    main()
finally:
    heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "ls",
        "ls architectures --json",
        "doctor",
        "doctor --json",
        "compress --help",
        "ls nonsense",
        "evaluate",
    ],
)
def test_verbs_that_need_no_model_import_nothing_heavy(words):
    command = [sys.executable, *STRICT, "-c", LIGHT, *words.split()]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "AssertionError" not in outcome.stderr
    assert outcome.returncode == {"ls nonsense": 1, "evaluate": 2}.get(words, 0)
    assert "Traceback" not in outcome.stderr.replace("SystemExit", "")


# what is told


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout == f"pliant {pliant.__version__}\n"
    assert pliant.__version__ == metadata.version("pliant")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_verb(flag):
    shown = run(flag)
    assert shown.exit_code == 0
    assert all(verb in shown.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_every_option(verb):
    shown = run(verb, "--help")
    assert shown.exit_code == 0
    assert f"Example: pliant {verb}" in " ".join(shown.stdout.split())
    for parameter in VERBS[verb].params:
        assert parameter.name == "help" or len(parameter.help) > 10


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_every_verb_can_be_typed(verb):
    program, name, *words = shlex.split(VERBS[verb].epilog.removeprefix("Example: "))
    assert (program, name) == ("pliant", verb)
    VERBS[verb].make_context(verb, words)


@pytest.mark.parametrize("verb", VERBS)
def test_no_help_speaks_of_an_option_that_is_not_there(verb):
    options = {o for parameter in VERBS[verb].params for o in (*parameter.opts, *parameter.secondary_opts)}
    told = " ".join([VERBS[verb].help, VERBS[verb].epilog, *(p.help or "" for p in VERBS[verb].params)])
    assert set(re.findall(r"--\w[\w-]*", told)) <= options | {"--help"}


def test_ls_lists_systems_and_architectures():
    shown = run("ls").stdout
    for name, entry in STEPS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary)}$", shown, re.M)
    assert re.search(r"^  llama ", shown, re.M)
    assert "architectures" not in run("ls", "systems").stdout
    tables = {"systems": STEPS, "scores": SCORES, "searches": SEARCHES, "importance": IMPORTANCE}
    assert set(json.loads(run("ls", "--json").stdout)) == {*tables, "architectures"}
    for title, table in tables.items():
        only = json.loads(run("ls", title, "--json").stdout)
        assert only == {title: {name: entry.summary for name, entry in table.items()}}


def test_ls_of_something_else_is_refused_with_what_there_is():
    with pytest.raises(
        PliantError,
        match="unknown list 'models'; choose from: systems, scores, searches, importance, architectures, blockpruner",
    ):
        run("ls", "models")


def test_doctor_tells_the_same_to_people_and_programs():
    found = json.loads(run("doctor", "--json").stdout)
    assert set(found) == set(diagnose())
    assert found["torch"] == metadata.version("torch")
    assert found["cores"] == os.cpu_count()
    shown = run("doctor").stdout
    assert all(re.search(rf"^{re.escape(name)} ", shown, re.M) for name in found)


# settings


@pytest.mark.parametrize("system", STEPS)
def test_every_setting_of_every_system_has_a_help_text(system):
    step = step_class(system)
    texts = {name: of.help for name, of in settings_of(step).items()}
    assert set(texts) == {field.name for field in dataclasses.fields(step)}
    assert all(len(text) > 10 for text in texts.values())


@pytest.mark.parametrize("system", STEPS)
def test_the_table_of_systems_is_true(system):
    assert step_class(system).kind == system
    assert inspect.getdoc(step_class(system))


def test_settings_become_what_their_fields_are():
    pairs = ["samples=8", "slack=0.5", "order=stored", "mlp_group=4", "split= 1:1:1 ", "head-group=2"]
    (step,) = recipe(["multipruner"], {"ratio": 0.1}, pairs)
    assert step == pliant.MultiPruner(
        ratio=0.1, samples=8, slack=0.5, order="stored", mlp_group=4, split="1:1:1", head_group=2
    )
    assert recipe(["multipruner"], {"ratio": 0.1}, ["mlp_group=none"])[0].mlp_group is None


def test_a_recipe_may_do_a_thing_twice():
    names = ["multipruner", "recover", "multipruner", "recover"]
    steps = recipe(names, {"ratio": 0.1}, ["recover.steps=5"])
    assert [step.kind for step in steps] == names
    assert steps[1] == steps[3] == pliant.Recover(steps=5)


@pytest.mark.parametrize(
    ("system", "rows"), [("multipruner", 128), ("fisher", 256), ("knapsack", 256), ("recover", 128)]
)
def test_a_known_subnet_is_put_in_order_by_as_many_rows_as_its_search_took(system, rows, tmp_path):
    found = tmp_path / "found.json"
    found.write_text(json.dumps({"skip": [], "keep": {"layers.1.mlp.channels": 30}}))
    cut, *others = known_subnet(found, [system], [])
    assert (cut.kind, cut.samples) == ("cut", rows)
    assert [step.kind for step in others] == (["recover"] if system == "recover" else [])
    assert known_subnet(found, [system], ["samples=7"])[0].samples == 7


def test_an_unknown_system_is_refused_with_those_there_are():
    with pytest.raises(StepError, match=r"unknown system 'wanda'; choose from: blockpruner, multipruner.* module:Name"):
        recipe(["wanda"], {"ratio": 0.1}, [])


@pytest.mark.parametrize("system", STEPS)
def test_an_unknown_setting_is_refused_with_every_setting_and_its_help(system):
    with pytest.raises(StepError, match=f"{system} has no setting 'colour'") as refusal:
        recipe([system], {"ratio": 0.1}, ["colour=red"])
    told = str(refusal.value)
    for name, of in settings_of(step_class(system)).items():
        assert re.search(rf"^  {name} +{re.escape(of.help)}( Default: .+)?$", told, re.M)


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("samples", "--set takes name=value, not 'samples'"),
        ("samples=many", "samples .*'many'"),
        ("samples=1.5", "samples .*'1.5'"),
        ("slack=some", "slack .*'some'"),
        (
            "order=maybe",
            "unknown order 'maybe'; choose from: l1, activation, fisher, stored, or name your own as module:Name",
        ),
        ("mlp_group=few", "mlp_group .*'few'"),
        ("samples=0", "samples must be a whole number of at least 1; not 0"),
        ("slack=nan", "slack"),
        ("metric=taste", "unknown metric 'taste'; choose from: perplexity, kl, or name your own as module:Name"),
        ("search=guess", "search must be one of lazy, exact, naive; not 'guess'"),
        ("split=1:2", "split must be blocks:channels:heads"),
    ],
)
def test_a_faulty_setting_is_refused_by_name(pair, told):
    with pytest.raises(StepError, match=told):
        recipe(["multipruner"], {"ratio": 0.1}, [pair])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_a_ratio_that_means_nothing_is_refused(ratio):
    with pytest.raises(RatioError, match="between 0 and 1"):
        recipe(["multipruner"], {"ratio": ratio}, [])


@pytest.mark.parametrize(
    ("systems", "pairs", "told"),
    [
        (["fisher"], [], "needs --ratio"),
        (["fisher", "knapsack"], ["fisher.ratio=0.1"], "needs --ratio"),
        (["channelpruner"], [], "give either ratio .* or macs_ratio"),
    ],
)
def test_a_pruner_without_a_ratio_is_refused(systems, pairs, told):
    with pytest.raises(StepError, match=told):
        recipe(systems, {}, pairs)


@pytest.mark.parametrize(
    ("systems", "pairs", "said"),
    [
        (["packed"], [], "--ratio 0.2 has no effect on packed;"),
        (["magnitude", "rtn"], [], "--ratio 0.2 has no effect on magnitude and rtn;"),
        (["multipruner"], ["ratio=0.4"], "--ratio 0.2 and --set ratio=0.4 contradict each other"),
        (["multipruner"], ["multipruner.ratio=0.4"], "contradict each other"),
        (["channelpruner"], ["ratio=none", "macs_ratio=0.1"], "contradict each other"),
        (["multipruner"], ["samples=4", "samples=8"], "--set samples is '4' and then '8'"),
    ],
)
def test_an_option_without_effect_is_refused(systems, pairs, said):
    with pytest.raises(StepError, match=re.escape(said)):
        recipe(systems, {"ratio": 0.2}, pairs)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, None, "7"])
@pytest.mark.parametrize(
    "step", [lambda **s: pliant.MultiPruner(ratio=0.1, **s), pliant.Recover, lambda **s: Cut(subnet=Subnet(), **s)]
)
def test_a_seed_out_of_range_is_refused(step, seed):
    step(seed=0), step(seed=2**63 - 1)
    with pytest.raises(StepError, match="seed must be a whole number from 0 to 9223372036854775807"):
        step(seed=seed)


def test_a_ratio_that_one_of_the_systems_takes_is_taken():
    pruner, packed = recipe(["fisher", "packed"], {"ratio": 0.2}, ["ratio=0.20"])
    assert (pruner.ratio, packed.kind) == (0.2, "packed")
    first, second = recipe(["fisher", "knapsack"], {"ratio": 0.2}, ["knapsack.ratio=0.1"])
    assert (first.ratio, second.ratio) == (0.2, 0.1)


def test_former_names_of_settings_are_taken_with_one_warning():
    with pytest.warns(FormerNameWarning) as warned:
        (step,) = recipe(["recover"], {}, ["batch=4", "recover.every=5", "lr=1e-3"])
    (said,) = warned
    assert str(said.message) == "recover: batch is now batch_size, every is now eval_steps, lr is now learning_rate"
    assert step == pliant.Recover(batch_size=4, eval_steps=5, learning_rate=1e-3)
    with pytest.raises(StepError, match="batch is now batch_size, and both are given; leave batch out"):
        recipe(["recover"], {}, ["batch=4", "batch_size=8"])


def test_a_known_subnet_is_cut_once(tmp_path):
    found = tmp_path / "found.json"
    found.write_text(json.dumps({"skip": [], "keep": {}}))
    with pytest.raises(StepError, match="fisher and knapsack are 2 pruners"):
        known_subnet(found, ["fisher", "knapsack"], [])


# exit codes


def test_success_is_0(entry):
    code, out, err = entry("ls", "systems")
    assert (code, err) == (0, "")
    assert "multipruner" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ls", "models"], "unknown list 'models'; choose from: systems"),
        (["inspect", "./gone"], "'./gone' is not a model folder"),
        (["evaluate", "FOLDER"], "nothing to evaluate"),
        (["evaluate", "FOLDER", "--perplexity", "gone.txt"], "no file at 'gone.txt'"),
        (["evaluate", "FOLDER", "--tasks", "gone.jsonl"], "no file at 'gone.jsonl'"),
        (["bench", "FOLDER", "--tokens", "0"], "tokens"),
        (["bench", "FOLDER", "--formats", "--batch", "2"], "in batches of 1"),
        (["compress", "FOLDER", "--system", "packed", "--set", "format=int3", "--out", "x"], "format must be one of"),
        (["inspect", "FOLDER", "--dtype", "float31"], "float31"),
        (["inspect", "FOLDER", "--device", "gpu"], "unknown device 'gpu'; choose one of auto, cuda, mps, cpu"),
        (["generate", "FOLDER", "Hello", "--tokens", "0"], "--tokens must be at least 1"),
        (
            ["generate", "FOLDER", "Hello", "--tokens", "252"],
            "5 + 252 tokens are more than the 256 positions of this model; give at most 251",
        ),
        (
            ["generate", "FOLDER", "y" * 300],
            "300 + 64 tokens are more than the 256 positions of this model; give a shorter prompt",
        ),
        (["bench", "FOLDER", "--formats", "--device", "cuda"], "packed layers run on the CPU; leave out --device"),
        (["bench", "FOLDER", "--formats", "--prompt", "250"], "250 + 32 tokens are more than the 256 positions"),
        (["generate", "FOLDER", "Hello", "--chat"], "chat template"),
        (["generate", "FOLDER", ""], "prompt"),
        (["export", "FOLDER", "--to", "onnx", "--out", "x"], "unknown export format 'onnx'"),
        (["compress", "FOLDER", "--system", "packed", "--ratio", "0.2", "--out", "x"], "--ratio 0.2 has no effect"),
        (["compress", "FOLDER", "--subnet", "found.json", "--ratio", "0.2", "--out", "x"], "give one of them"),
        (["compress", "FOLDER", "--system", "packed", "--column", "body", "--out", "x"], "no effect without --data"),
        (["compress", "FOLDER", "--ratio", "2", "--data", "PROSE", "--out", "x"], "between 0 and 1"),
        (["compress", "FOLDER", "--ratio", "0.1", "--data", "gone.txt", "--out", "x"], "no file at"),
        (["compress", "FOLDER", "--ratio", "0.1", "--data", "PROSE", "--out", "FOLDER"], "is the model itself"),
        (["compress", "FOLDER", "--ratio", "0.1", "--data", "PROSE", "--out", "FULL"], "--overwrite"),
        (
            ["compress", "FOLDER", "--ratio", "0.1", "--data", "PROSE", "--out", "x", "--set", "colour=red"],
            "Rows of calibration text to choose blocks on.",
        ),
    ],
)
def test_a_refusal_is_1_with_the_reason_on_stderr(entry, folder, prose, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    places = {"FOLDER": folder, "PROSE": prose, "FULL": prose.parent}
    code, out, err = entry(*(places.get(word, word) for word in words))
    assert code == 1
    assert out == ""
    assert err.startswith("pliant: ")
    assert told in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["ls", "--fast"],
        ["compress", "m"],
        ["bench", "m", "--prompt", "x"],
        ["generate", "m", "Hi", "--sample", "--seed", str(10**23)],
        ["generate", "m", "Hi", "--seed", "-1"],
    ],
)
def test_wrong_usage_is_2(entry, words):
    code, out, err = entry(*words)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_busy_is_3(entry, folder, prose, tmp_path):
    work = tmp_path / "small.work"
    work.mkdir()
    with FileLock(work / "lock"):
        code, out, err = entry("compress", folder, "--ratio", "0.1", "--data", prose, "--out", tmp_path / "small")
    assert (code, out) == (3, "")
    assert err.startswith("pliant: another run is writing to")


def test_interrupted_is_130_and_says_what_is_kept(entry, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("pliant.cli.doctor.diagnose", interrupt)
    code, out, err = entry("doctor")
    assert (code, out) == (130, "")
    assert "interrupted" in err


# verbs on a model


def test_inspect_shows_blocks_and_sizes(folder, model):
    count = sum(parameter.numel() for parameter in model.parameters())
    shown = run("inspect", folder).stdout
    assert "self-check passed" in shown
    assert f"{count:,} parameters in 4 layers" in shown
    assert re.search(r"attention.*0-3", shown)
    assert re.search(r"mlp.*0-3.*channels: 48 x 1", shown)
    found = json.loads(run("inspect", folder, "--no-check", "--json").stdout)
    assert found["self_check"] == "not run"
    assert found["parameters"] == count
    assert [block["block"] for block in found["blocks"]] == [
        f"layers.{layer}.{kind}" for layer in range(4) for kind in ("attention", "mlp")
    ]
    assert found["dtype"] == "float32"


def test_inspect_reads_in_another_type_when_asked(folder):
    assert json.loads(run("inspect", folder, "--dtype", "bfloat16", "--json").stdout)["dtype"] == "bfloat16"


def test_evaluate_prints_what_the_library_finds(folder, prose, task):
    words = ["evaluate", folder, "--perplexity", prose, "--tasks", task, "--seqlen", 32, "--windows", 4, "--limit", 5]
    expected = pliant.evaluate(pliant.load(folder), perplexity=prose, tasks=[task], seqlen=32, windows=4, limit=5)
    assert json.loads(run(*words, "--json").stdout) == expected
    shown = run(*words).stdout
    assert f"{expected['perplexity']['prose.txt']['perplexity']:.3f}" in shown
    assert re.search(r"perplexity, prose\.txt.*4 x 32 tokens", shown)
    assert re.search(rf"yes-no acc .*{expected['tasks']['yes-no']['acc']:.1%}.*5 questions", shown)
    assert "KL" not in shown


def test_evaluate_against_a_reference_prints_the_divergence(folder, prose):
    words = ["evaluate", folder, "--perplexity", prose, "--reference", folder, "--seqlen", 32, "--windows", 2]
    assert json.loads(run(*words, "--json").stdout)["perplexity"]["prose.txt"]["kl"] == 0
    assert re.search(r"KL, prose\.txt.*0\.0000", run(*words).stdout)


def test_evaluate_against_another_model_prints_both_and_the_difference(folder, prose, task, tokenizer, tmp_path):
    other = tmp_path / "other"
    pico("llama", seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    words = ["evaluate", folder, "--perplexity", prose, "--tasks", task, "--seqlen", 32, "--windows", 4]
    found = json.loads(run(*words, "--against", other, "--json").stdout)
    settings = {"perplexity": prose, "tasks": [task], "seqlen": 32, "windows": 4}
    a, b = (pliant.evaluate(pliant.load(one), **settings, items=True) for one in (folder, other))
    assert found["comparison"] == pliant.compare(a, b)
    assert found["against"] == pliant.evaluate(pliant.load(other), **settings)
    assert found["tasks"] == pliant.evaluate(pliant.load(folder), **settings)["tasks"]
    assert "items" not in found["perplexity"]["prose.txt"]
    shown = run(*words, "--against", other).stdout
    for part in (found, found["against"]):
        assert f"{part['perplexity']['prose.txt']['perplexity']:.3f}" in shown
    loss = found["comparison"]["perplexity"]["prose.txt"]["loss"]
    assert re.search(rf"prose\.txt loss.*{re.escape(format(loss['difference'], '+.4f'))}.* to .*{loss['p']:.4f}", shown)


def test_evaluate_prints_matches(folder, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}), "utf-8")
    shown = run("evaluate", folder, "--tasks", path, "--max-new-tokens", 4).stdout
    assert re.search(r"sums match.*0\.0%.*1 questions", shown)
    assert "acc" not in shown


def test_evaluate_with_the_harness_says_what_is_missing(entry, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = entry("evaluate", folder, "--harness", "arc_easy")
    assert (code, out) == (1, "")
    assert "pip install 'pliant[eval]'" in err


def test_bench_prints_rates_and_speedup(folder):
    words = ["bench", folder, "--prompt", 8, "--tokens", 2, "--repeats", 2]
    found = json.loads(run(*words, "--against", folder, "--json").stdout)
    assert found["settings"] == {"prompt": 8, "tokens": 2, "batch": 1, "repeats": 2}
    assert found["speedup"]["decode"]["median"] > 0
    shown = run(*words).stdout
    assert "decode, tokens/s" in shown
    assert "peak memory" in shown
    assert "speed-up" not in shown
    assert "speed-up" in run(*words, "--against", folder).stdout


@pytest.mark.slow
def test_bench_compares_formats_and_recommends_one(folder, prose):
    words = ["bench", folder, "--formats", "--prompt", 8, "--tokens", 4, "--repeats", 1]
    found = json.loads(run(*words, "--perplexity", prose, "--json").stdout)
    assert set(found["formats"]) == {"float32", "bf16", "int8", "int4, groups of 32", "int4, groups of 128"}
    for row in found["formats"].values():
        split = row["split"]
        assert split["total"] == pytest.approx(split["linears"] + split["attention"] + split["rest"])
        assert min(split["linears"], split["attention"]) > 0
        assert row["perplexity"] > 1
    assert found["recommended"] in found["formats"]
    shown = run(*words).stdout
    assert "Recommended: " in shown
    assert "Leaving zeros out is faster here" in shown


def test_generate_continues_the_prompt(folder, model, tokenizer):
    ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=ids**0, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(out[0], skip_special_tokens=True)
    shown = run("generate", folder, "Once upon", "--tokens", 6).stdout
    assert shown == expected + "\n"
    assert shown.startswith("Once upon")
    assert len(shown) > len("Once upon\n")


def test_generate_draws_by_its_seed(folder):
    drawn = [run("generate", folder, "Once", "--sample", "--seed", seed, "--tokens", 12).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_chats_with_the_template_of_the_model(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}:")
    answer = run("generate", folder, "Hello", "--chat", "--tokens", 5).stdout
    assert run("generate", folder, "[Hello]:", "--tokens", 5).stdout == "[Hello]:" + answer


def test_compress_prints_json_on_stdout_and_events_on_stderr(folder, prose, tmp_path):
    out = tmp_path / "small"
    words = [
        "compress",
        folder,
        "--ratio",
        "0.1",
        "--data",
        prose,
        "--out",
        out,
        "--no-speed",
        "--windows",
        "2",
        "--json",
    ]
    words += [f"--set={pair}" for pair in ("seqlen=32", "samples=8", "width_samples=8")]
    command = [sys.executable, *STRICT, "-c", "from pliant.cli import main; main()", *map(str, words)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=quiet)
    assert outcome.returncode == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["ratio"] >= 0.1
    assert report == json.loads((out / "report.json").read_text("utf-8"))
    events = [json.loads(line) for line in outcome.stderr.splitlines()]
    assert {event["event"] for event in events} == {"note", "stage", "step"}


def test_compress_shows_people_a_table_and_where_it_wrote(folder, prose, tmp_path):
    out = tmp_path / "small"
    words = ["compress", folder, "--ratio", "0.1", "--data", prose, "--out", out, "--no-speed", "--windows", "2"]
    words += [f"--set={pair}" for pair in ("seqlen=32", "samples=8", "width_samples=8", "head_group=1")]
    shown = run(*words).stdout
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert f"{report['after']['parameters']:,} (-{report['ratio']:.1%})" in shown
    assert f"wrote {out} (report: {out / 'report.html'})" in shown


RUNS = {
    "inspect": ["--no-check"],
    "compress": ["--ratio", "0.1", "--data", "PROSE", "--out", "OUT"],
    "evaluate": ["--perplexity", "PROSE"],
    "bench": [],
    "generate": ["Hello"],
    "export": ["--out", "OUT"],
}


@pytest.mark.parametrize("verb", RUNS)
def test_every_verb_that_runs_a_model_takes_a_device_and_a_dtype(verb, entry, folder, prose, tmp_path, monkeypatch):
    asked = {}

    def load(source, **options):
        asked.update(options, source=source)
        raise DataError("seen")

    for module in ("pliant.checkpoint.load", "pliant.run.compress"):
        monkeypatch.setattr(f"{module}.load", load)
    words = [{"PROSE": prose, "OUT": tmp_path / "out"}.get(word, word) for word in RUNS[verb]]
    for given, expected in (
        ((), {"dtype": "auto", "device": "cpu"}),
        (("--dtype", "bfloat16", "--device", "cuda:1"), {"dtype": "bfloat16", "device": "cuda:1"}),
    ):
        assert entry(verb, folder, *words, *given)[0] == 1
        assert {key: asked[key] for key in expected} == expected


def test_every_verb_in_the_list_is_there_and_no_other_loads_a_model():
    others = {"doctor", "ls", "demo", "run_", "plan"}
    assert {command.callback.__name__ for command in app.registered_commands} == {*RUNS, *others}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused(entry, folder):
    code, out, err = entry("inspect", folder, "--device", "cuda")
    assert (code, out) == (1, "")
    assert "finds no device 'cuda' on this machine; it finds cpu" in err


def test_a_model_that_gives_no_numbers_is_refused_and_never_printed(entry, folder, prose, task):
    broken = pliant.load(folder)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.mul_(1e5)
        broken.model.layers[0].mlp.up_proj.weight.mul_(1e4)
    broken.save_pretrained(folder)
    for words in (["--perplexity", prose], ["--tasks", task]):
        for form in ([], ["--json"]):
            code, out, err = entry(
                "evaluate", folder, *words, *form, "--seqlen", 32, "--windows", 2, "--dtype", "float16"
            )
            assert (code, out) == (1, "")
            assert "its outputs in float16 are not" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_finite_figures_only(value):
    with pytest.raises(WeightError, match=rf"tasks\.arc\[1\]\.acc is {value}, which is not finite"):
        to_json({"tasks": {"arc": [{"acc": 1.0}, {"acc": value}]}})
    assert json.loads(to_json({"a": [1, 2.5, None, "nan"]})) == {"a": [1, 2.5, None, "nan"]}


def test_continuations_are_printed(folder, tmp_path):
    path = tmp_path / "lambada.jsonl"
    path.write_text("\n".join(json.dumps({"context": c, "continuation": "moon"}) for c in ("the", "a")), "utf-8")
    shown = run("evaluate", folder, "--tasks", path).stdout
    assert re.search(r"lambada acc .*0\.0%.*2 questions", shown)
    assert re.search(r"lambada perplexity .*\d\.\d{3} .*\d\.\d{3} .*2 questions", shown)


def test_a_packed_model_says_how_it_runs(folder, tmp_path):
    for name, options, said in (
        ("native", [], "all run in one native call"),
        ("mixed", ["--set", "rules=down_proj=dense"], "run one by one: not all of its linear layers are packed"),
    ):
        out = tmp_path / name
        words = ["compress", folder, "--system", "packed", "--out", out, "--no-speed", *options]
        assert said in " ".join(run(*words).stdout.split())
        found = json.loads(run("inspect", out, "--json").stdout)
        assert found["native"] == (name == "native")
        assert found["device"] == "cpu"
        shown = " ".join(run("inspect", out).stdout.split())
        assert (
            "Runs in one native call." if found["native"] else f"Runs layer by layer: {found['why_not_native']}."
        ) in shown


def test_errors_are_also_the_builtin_ones_a_caller_expects():
    assert issubclass(DataError, ValueError)
    assert issubclass(StepError, ValueError)
    assert issubclass(ArtefactError, OSError)
