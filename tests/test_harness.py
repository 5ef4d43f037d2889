import importlib.util
import json
import sys
import types

import pytest

import pliant
from pliant.errors import PliantError, WeightError

SAMPLES = [
    {
        "doc_id": number,
        "doc_hash": f"d{number}",
        "prompt_hash": f"p{number}",
        "target_hash": "t",
        "filter": "none",
        "metrics": ["acc", "f1"],
        "acc": right,
        "f1": (1, 0),
    }
    for number, right in ((1, 1.0), (0, 0.0))
]
RESULTS = {
    "arc_easy": {
        "alias": "arc_easy",
        "sample_len": 2,
        "acc,none": 0.5,
        "acc_stderr,none": 0.5,
        "f1_stderr,none": "N/A",
    },
    "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.1, "exact_match_stderr,strict": 0.05},
}
COUNTS = {"arc_easy": {"original": 9, "effective": 2}}


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for lm-eval that notes what it is called with."""
    called = {}

    class HFLM:
        def __init__(self, **options):
            called["lm"] = options

    def simple_evaluate(lm, **options):
        called["evaluate"] = options
        assert isinstance(lm, HFLM)
        if "no_such_task" in options["tasks"]:
            raise KeyError("'no_such_task' is not a registered task")
        found = {"results": RESULTS, "n-samples": COUNTS}
        return {**found, "samples": {"arc_easy": SAMPLES}} if options["log_samples"] else found

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_the_harness_gets_the_model_and_gives_plain_figures(fake, model, tokenizer):
    found = pliant.evaluate(model, harness=["arc_easy", "gsm8k"], limit=2, tokenizer=tokenizer)
    assert fake["lm"]["pretrained"] is model
    assert fake["lm"]["tokenizer"] is tokenizer
    assert fake["evaluate"] == {"tasks": ["arc_easy", "gsm8k"], "limit": 2, "log_samples": False}
    assert found == {
        "perplexity": {},
        "tasks": {},
        "harness": {
            "arc_easy": {"acc": 0.5, "acc_stderr": 0.5, "questions": 2},
            "gsm8k": {"exact_match,strict": 0.1, "exact_match,strict_stderr": 0.05},
        },
    }


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_of_the_harness_that_is_no_number_is_refused(value, model, tokenizer, monkeypatch):
    monkeypatch.setitem(RESULTS["gsm8k"], "exact_match,strict", value)
    with pytest.raises(WeightError, match=rf"exact_match of gsm8k is {value}"):
        pliant.evaluate(model, harness=["gsm8k"], tokenizer=tokenizer)


def test_items_of_the_harness_can_be_compared(fake, model, tokenizer):
    found = pliant.evaluate(model, harness=["arc_easy"], tokenizer=tokenizer, items=True)
    assert fake["evaluate"]["log_samples"] is True
    assert found["harness"]["arc_easy"]["items"]["acc"] == [0.0, 1.0]
    assert "f1" not in found["harness"]["arc_easy"]["items"]
    assert pliant.compare(found, found)["harness"]["arc_easy"]["acc"]["p"] == 1


@pytest.mark.usefixtures("fake")
def test_a_task_that_lm_eval_does_not_know_is_refused(model, tokenizer):
    with pytest.raises(PliantError, match="lm-eval cannot run no_such_task: 'no_such_task' is not a registered task"):
        pliant.evaluate(model, harness=["no_such_task"], tokenizer=tokenizer)


def test_without_lm_eval_the_message_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PliantError, match=r"arc_easy.*pip install 'pliant\[eval\]'"):
        pliant.evaluate(model, harness=["arc_easy"], tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("default")
def test_lm_eval_itself_finds_what_we_find(model, tokenizer, tmp_path):
    rows = [
        {
            "question": f"Is {number} even?",
            "choices": {"text": ["no, surely not", "yes"], "label": ["A", "B"]},
            "answerKey": "AB"[number % 3 == 0],
        }
        for number in range(12)
    ]
    data, task = tmp_path / "rows.jsonl", tmp_path / "task.yaml"
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    task.write_text(
        json.dumps(  # JSON is YAML
            {
                "task": "even",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "{{choices.text}}",
                "doc_to_target": "{{choices.label.index(answerKey)}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        ),
        "utf-8",
    )
    found = pliant.evaluate(model, harness=[str(task)], tasks=[data], tokenizer=tokenizer, limit=10, items=True)
    theirs, ours = found["harness"]["even"], found["tasks"]["rows"]
    assert theirs["questions"] == ours["questions"] == 10
    for metric in ("acc", "acc_norm"):
        assert theirs[metric] == ours[metric]
        assert theirs["items"][metric] == ours["items"][metric]
    assert pliant.compare(found, found)["harness"]["even"]["acc"]["difference"] == 0
