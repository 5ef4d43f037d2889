import json
import math
import random

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import pliant
from pico import pico
from pico import tokenizer as pico_tokenizer
from pliant.data import OpenQuestion, Question
from pliant.errors import DataError
from pliant.measure.quality.generated_answers import STOP, generate


def _prompts(count):
    drawn = random.Random(0)
    words = ["sun", "moon", "river", "of", "the", "green", "é", "walks"]
    return [" ".join(drawn.choices(words, k=drawn.randint(1, 12))) for _ in range(count)]


@torch.no_grad()
def _greedy(model, tokenizer, prompt, count):
    """One prompt, the whole sequence again for every token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        ids = [*ids, model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()]
        if ids[-1] == model.config.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
def test_a_batch_writes_what_each_prompt_alone_gives(name, tokenizer):
    model = pico(name)
    prompts = _prompts(20)  # more than one batch
    written = generate(model, tokenizer, "some", prompts, 8)
    assert written == [_greedy(model, tokenizer, prompt, 8) for prompt in prompts]
    assert len(set(written)) > 5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_cut_model_writes_the_same_in_a_batch_too(name, tokenizer):
    model = pico(name)
    subnet = pliant.Subnet().without("layers.0.attention").without("layers.2.mlp")
    pliant.apply(model, pliant.Cut(subnet=subnet), progress=False)
    prompts = _prompts(6)
    written = generate(model, tokenizer, "some", prompts, 8)
    assert written == [_greedy(model, tokenizer, prompt, 8) for prompt in prompts]


def test_the_share_of_matches_has_its_standard_error(model, tokenizer):
    prompts = _prompts(10)
    written = generate(model, tokenizer, "some", prompts, 6)
    right = [OpenQuestion(p, w) for p, w in zip(prompts[:7], written, strict=False)]
    assert all(question.matches(text) for question, text in zip(right, written, strict=False))
    items = [*right, *(OpenQuestion(p, "something else entirely") for p in prompts[7:])]
    found = pliant.evaluate(model, tasks={"some": items}, tokenizer=tokenizer, max_new_tokens=6)["tasks"]["some"]
    assert found == {"match": 0.7, "stderr": pytest.approx(math.sqrt(0.7 * 0.3 / 10)), "questions": 10}


def test_an_open_file_is_recognised(folder, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = pliant.evaluate(pliant.load(folder), tasks=[path], limit=3, max_new_tokens=4)["tasks"]
    assert set(found["sums"]) == {"match", "stderr", "questions"}
    assert found["sums"]["questions"] == 3


def test_a_question_of_its_own_ends_an_answer(model, tokenizer, monkeypatch):
    ids = tokenizer(f" 42\n{STOP} what", return_tensors="pt")["input_ids"]
    kept = {}

    def scripted(input_ids, **options):
        kept.update(options)
        return torch.cat([input_ids, ids.expand(len(input_ids), -1)], 1)

    monkeypatch.setattr(model, "generate", scripted)
    assert generate(model, tokenizer, "some", ["7"], 30) == [" 42\n"]
    assert kept["stop_strings"] == [STOP]


def test_generation_ends_with_the_last_answer_of_a_batch(tokenizer, monkeypatch):
    model = pico("gpt2")
    prompts = _prompts(20)
    written = generate(model, tokenizer, "some", prompts, 8)
    place = next(place for place, text in enumerate(written) if text.isascii() and text.strip())
    monkeypatch.setattr("pliant.measure.quality.generated_answers.STOP", written[place][0])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, tokenizer, "some", [prompts[place]], 8) == [""]
    assert len(calls) == 2  # one to see that the model gives numbers, one for the answer


def test_a_prompt_too_long_loses_its_beginning(model, tokenizer):
    tail = "the moon walks slowly " * 11  # 242 tokens; with 8 new ones they fit the 256 positions
    assert generate(model, tokenizer, "some", ["x " * 60 + tail], 14) == generate(model, tokenizer, "some", [tail], 14)


@pytest.mark.parametrize("count", [0, -1, 256, 1000])
def test_no_room_for_an_answer_is_refused(model, tokenizer, count):
    with pytest.raises(DataError, match=rf"max_new_tokens={count} leaves no room.*256"):
        pliant.evaluate(model, tasks={"some": [OpenQuestion("7", "8")]}, tokenizer=tokenizer, max_new_tokens=count)


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="task 'some', question 2: the prompt has no token to continue from"):
        generate(model, tokenizer, "some", ["7", ""], 4)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(DataError, match="this is the tokenizer of another model"):
        generate(pico("llama", vocab_size=40), tokenizer, "some", ["seven"], 4)


def test_both_kinds_in_one_task_are_refused(model, tokenizer):
    items = [Question("7", (" a", " b"), 0), OpenQuestion("7", "8")]
    with pytest.raises(DataError, match="task 'both' mixes"):
        pliant.evaluate(model, tasks={"both": items}, tokenizer=tokenizer)


def test_a_prompt_does_not_end_the_sequence(tokenizer):
    model, ending = pico(), pico_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    prompts = _prompts(3)
    assert generate(model, ending, "some", prompts, 8) == generate(model, tokenizer, "some", prompts, 8)
