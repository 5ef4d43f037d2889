import copy
import gzip
import json
import math
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import pliant
from pico import DECODERS, VOCABULARY, config, pico
from pico import tokenizer as pico_tokenizer
from pliant.data import Continuation, OpenQuestion, Question
from pliant.errors import ArchitectureError, DataError, MemoryLimitError, PliantError, WeightError
from pliant.forward.losses import kl, nll
from pliant.forward.windows import longest_of, windows_for
from pliant.measure.quality.multiple_choice import log_likelihoods
from pliant.measure.speed.token_breakdown import token_time


def _logits(seed, *shape, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _softmax(row):
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


def test_positions_are_counted_whatever_a_family_calls_them():
    shape = {"vocab_size": 300, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mpt", **shape))
    words = pliant.text(["the cat sat on the mat " * 20])
    assert windows_for(model, pico_tokenizer(), words, 64).shape[1] == 64
    with pytest.raises(DataError, match="windows of 65 tokens are longer than the 64 positions of this model"):
        windows_for(model, pico_tokenizer(), words, 65)
    assert longest_of(pico("bloom")) == 2**31


# the formulas


def test_nll_is_the_mean_over_the_tokens_that_have_one_before_them():
    logits, ids = _logits(0, 3, 5, 7), torch.arange(15).view(3, 5) % 7
    by_hand = [
        sum(-math.log(_softmax(window[i])[row[i + 1]]) for i in range(4)) / 4
        for window, row in zip(logits.tolist(), ids.tolist(), strict=True)
    ]
    found = nll(logits, ids)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_kl_is_the_mean_divergence_from_the_reference_over_every_token():
    ours, theirs = _logits(0, 2, 4, 6), _logits(1, 2, 4, 6)
    by_hand = []
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        each = [
            sum(q * math.log(q / p) for p, q in zip(_softmax(x), _softmax(y), strict=True))
            for x, y in zip(a, b, strict=True)
        ]
        by_hand.append(sum(each) / 4)
    found = kl(ours, theirs)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert kl(theirs, ours).tolist() != pytest.approx(by_hand, rel=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-50, 50), st.sampled_from([torch.float32, torch.bfloat16]))
def test_kl_is_never_negative_and_zero_for_the_same_distribution(seed, shift, dtype):
    logits = _logits(seed, 2, 3, 11).to(dtype)
    assert kl(logits, logits).tolist() == [0.0, 0.0]
    assert kl(logits.float() + shift, logits).tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    assert (kl(logits, _logits(seed + 1, 2, 3, 11)) > 0).all()


# perplexity


def test_a_model_that_knows_nothing_has_the_vocabulary_size_as_perplexity(model, tokenizer, prose):
    torch.nn.init.zeros_(model.lm_head.weight)
    found = pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=32, windows=8)
    row = found["perplexity"]["prose.txt"]
    assert row["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert row["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert row["stderr"] == pytest.approx(0, abs=1e-6)
    assert (row["windows"], row["seqlen"]) == (8, 32)
    assert found["tasks"] == {}


def test_perplexity_is_that_of_one_window_at_a_time(model, tokenizer, prose):
    # 40 windows of 32 tokens do not fit one batch
    row = pliant.evaluate(model, perplexity=str(prose), tokenizer=tokenizer, seqlen=32, windows=40)
    row = row["perplexity"]["prose.txt"]
    with torch.no_grad():
        losses = [
            model(input_ids=ids[None], labels=ids[None]).loss.item()
            for ids in pliant.text(prose).windows(tokenizer, 32, 40)
        ]
    mean = sum(losses) / 40
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 39)
    assert row["loss"] == pytest.approx(mean, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert row["stderr"] == pytest.approx(spread / math.sqrt(40), rel=1e-3)


def test_a_single_window_has_no_standard_error(model, tokenizer, prose):
    row = pliant.evaluate(model, perplexity=pliant.text(prose), tokenizer=tokenizer, seqlen=16, windows=1)
    assert row["perplexity"]["prose.txt"]["stderr"] is None


def test_several_texts_have_a_figure_each(model, tokenizer, prose):
    texts = [prose, pliant.text(["another text " * 9])]
    found = pliant.evaluate(model, perplexity=texts, tokenizer=tokenizer, seqlen=16, windows=2)["perplexity"]
    assert list(found) == ["prose.txt", "a list"]
    assert found["prose.txt"]["loss"] != found["a list"]["loss"]


def test_texts_of_the_same_name_have_a_figure_each_too(model, tokenizer):
    texts = [pliant.text(["one text " * 9]), pliant.text(["another text " * 9])]
    found = pliant.evaluate(model, perplexity=texts, tokenizer=tokenizer, seqlen=16, windows=2)["perplexity"]
    assert len(found) == 2


def test_windows_are_shortened_to_what_the_model_reads(model, tokenizer, prose):
    row = pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, windows=2)["perplexity"]["prose.txt"]
    assert (row["windows"], row["seqlen"]) == (2, 256)


def test_the_tokenizer_is_that_of_the_folder_when_left_out(folder, tokenizer, prose):
    model = pliant.load(folder)
    found = pliant.evaluate(model, perplexity=prose, seqlen=16, windows=2)
    assert found == pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=16, windows=2)


def test_a_model_from_nowhere_needs_a_tokenizer(model, prose):
    with pytest.raises(PliantError, match="pass tokenizer="):
        pliant.evaluate(model, perplexity=prose)


# divergence from a reference


def test_kl_against_a_reference_is_that_of_whole_distributions(model, tokenizer, prose):
    other = pico("llama", seed=1)
    ids = pliant.text(prose).windows(tokenizer, 32, 20)
    with torch.no_grad():
        ours = model(input_ids=ids).logits.double().log_softmax(-1)
        theirs = other(input_ids=ids).logits.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum").item() / ids.numel()
    found = pliant.evaluate(model, perplexity=prose, reference=other, tokenizer=tokenizer, seqlen=32, windows=20)
    assert found["perplexity"]["prose.txt"]["kl"] == pytest.approx(expected, rel=1e-4)


def test_a_model_does_not_diverge_from_itself(model, tokenizer, prose):
    found = pliant.evaluate(
        model, perplexity=prose, reference=copy.deepcopy(model), tokenizer=tokenizer, seqlen=32, windows=4
    )
    assert found["perplexity"]["prose.txt"]["kl"] == 0


def test_the_reference_is_measured_in_evaluation_mode_and_put_back(tokenizer, prose):
    model = pico("gpt2")
    reference = copy.deepcopy(model).train()  # gpt2 drops out while it trains
    found = pliant.evaluate(model, perplexity=prose, reference=reference, tokenizer=tokenizer, seqlen=32, windows=4)
    assert found["perplexity"]["prose.txt"]["kl"] == 0
    assert reference.training


def test_a_reference_with_another_vocabulary_is_refused(model, tokenizer, prose):
    other = pico("llama", vocab_size=VOCABULARY + 20)
    with pytest.raises(DataError, match="vocabular"):
        pliant.evaluate(model, perplexity=prose, reference=other, tokenizer=tokenizer, seqlen=32, windows=2)


# questions


def _questions(count):
    drawn = random.Random(0)
    words = ["sun", "moon", "river", "mountain", "of", "the", "and", "a", "green", "é", "雪", "walks", "slowly"]

    def some(least, most):
        return " ".join(drawn.choices(words, k=drawn.randint(least, most)))

    return [Question(some(1, 12), tuple(" " + some(1, 6) for _ in range(drawn.randint(2, 4))), 0) for _ in range(count)]


@torch.no_grad()
def _log_likelihood(model, tokenizer, context, choice):
    """One sequence at a time, one token at a time."""
    known, whole = tokenizer(context)["input_ids"], tokenizer(context + choice)["input_ids"]
    logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(known), len(whole)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_choices_are_those_of_an_unbatched_computation(name, tokenizer):
    model = pico(name)
    model.get_output_embeddings().weight.data *= 20  # sure of itself, so that length alone does not decide
    items = _questions(20)
    scores = [[_log_likelihood(model, tokenizer, q.context, c) for c in q.choices] for q in items]
    likeliest = [row.index(max(row)) for row in scores]
    per_character = []
    for question, row in zip(items, scores, strict=True):
        shares = [s / len(c.strip()) for s, c in zip(row, question.choices, strict=True)]
        per_character.append(shares.index(max(shares)))
    assert likeliest != per_character
    assert len({*likeliest}) > 1

    for picked, metric in ((likeliest, "acc"), (per_character, "acc_norm")):
        right = [Question(q.context, q.choices, p) for q, p in zip(items, picked, strict=True)]
        wrong = [Question(q.context, q.choices, (p + 1) % len(q.choices)) for q, p in zip(items, picked, strict=True)]
        mixed = right[:14] + wrong[14:]
        tasks = {"right": right, "wrong": wrong, "mixed": mixed}
        found = pliant.evaluate(model, tasks=tasks, tokenizer=tokenizer)["tasks"]
        assert [found[task][metric] for task in tasks] == pytest.approx([1.0, 0.0, 0.7])
        if metric == "acc":
            assert found["mixed"]["stderr"] == pytest.approx(math.sqrt(0.7 * 0.3 / 20))
        else:
            assert found["mixed"]["stderr_norm"] == pytest.approx(math.sqrt(0.7 * 0.3 / 20))
        assert found["mixed"]["questions"] == 20


def test_a_context_longer_than_the_model_reads_loses_its_beginning(model, tokenizer):
    tail = "the moon walks slowly " * 11  # 242 of the 256 positions
    choices = (" a river", " green")
    short = [_log_likelihood(model, tokenizer, ("x " * 50 + tail)[-(256 - len(c)) :], c) for c in choices]
    answer = short.index(max(short))
    items = [Question("y " * 300 + "x " * 50 + tail, choices, answer)]
    assert pliant.evaluate(model, tasks={"long": items}, tokenizer=tokenizer)["tasks"]["long"]["acc"] == 1


def test_a_sentence_is_scored_after_each_option_put_into_it(model, tokenizer):
    contexts, rest = ("the moon walks past the sun", "the moon walks past the river"), " and walks slowly"
    scores = [_log_likelihood(model, tokenizer, context, rest) for context in contexts]
    answer = scores.index(max(scores))
    tasks = {
        "right": [Question(contexts, (rest, rest), answer)],
        "wrong": [Question(contexts, (rest, rest), 1 - answer)],
    }
    found = pliant.evaluate(model, tasks=tasks, tokenizer=tokenizer)["tasks"]
    assert [found[task][metric] for task in tasks for metric in ("acc", "acc_norm")] == [1, 1, 0, 0]


def test_the_space_between_context_and_choice_belongs_to_the_choice(model, tokenizer):
    same = [Question("the moon", (" walks", " is"), 0), Question("the moon ", ("walks", "is"), 0)]
    assert log_likelihoods(model, tokenizer, "some", same[:1]) == log_likelihoods(model, tokenizer, "some", same[1:])


def test_choices_of_one_token_share_a_row(model, tokenizer):
    items = [Question(f"{context}:", tuple("abcd"), 0) for context in ("sun", "moon", "river")]
    expected = [[_log_likelihood(model, tokenizer, q.context, c) for c in q.choices] for q in items]
    shapes = []
    model.register_forward_pre_hook(lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    for found, by_hand in zip(log_likelihoods(model, tokenizer, "some", items), expected, strict=True):
        assert found == pytest.approx(by_hand, rel=1e-4)
    assert shapes == [(3, len("river:"))]


def test_a_tokenizer_that_ends_every_sequence_changes_no_choice(model, tokenizer):
    ending = pico_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending("ab")["input_ids"][-1] == 2
    items = _questions(5)
    assert log_likelihoods(model, ending, "some", items) == log_likelihoods(model, tokenizer, "some", items)


def test_a_model_that_gives_no_numbers_answers_nothing_rightly(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[40] = math.nan
    kinds = (Question("the moon", (" walks", " is"), 0), OpenQuestion("7", "8"), Continuation("the moon", " walks"))
    for item in kinds:
        with pytest.raises(WeightError, match=r"lm_head.weight holds 36 value\(s\) that are not finite"):
            pliant.evaluate(model, tasks={"some": [item]}, tokenizer=tokenizer, max_new_tokens=4)


def test_a_model_that_overflows_in_half_precision_has_no_perplexity_and_no_share(tokenizer, prose):
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e5)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e4)
    half = copy.deepcopy(model).half()
    with pytest.raises(WeightError, match=r"loss on 'prose.txt' is nan.* in float16 are not; load it with"):
        pliant.evaluate(half, perplexity=prose, tokenizer=tokenizer, seqlen=32, windows=2)
    kinds = {
        "log-likelihood (of a choice )?is nan": (*_questions(3), Continuation("the moon", " walks")),
        "largest logit is nan": [OpenQuestion("7", "8")],
    }
    for told, items in kinds.items():
        for item in items:
            with pytest.raises(WeightError, match=rf"task 'some'.*{told}.* in float16 are not; load it with"):
                pliant.evaluate(half, tasks={"some": [item]}, tokenizer=tokenizer, max_new_tokens=4)
    assert math.isfinite(
        pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=32, windows=2)["perplexity"]["prose.txt"][
            "loss"
        ]
    )


def test_a_finite_loss_without_a_finite_exponential_is_no_perplexity(model, tokenizer, prose):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(WeightError, match=r"loss on 'prose.txt' is \d.* and its perplexity overflows"):
        pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=32, windows=2)


def test_a_broken_reference_is_named(model, tokenizer, prose):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[40] = math.nan
    with pytest.raises(WeightError, match=r"lm_head\.weight holds 36"):
        pliant.evaluate(model, perplexity=prose, reference=broken, tokenizer=tokenizer, seqlen=32, windows=2)


def test_a_choice_after_an_empty_context_is_not_free(model, tokenizer):
    # without a context the first token of a choice has nothing to be predicted from
    items = [Question("", ("the green river", "a"), 1)]
    with pytest.raises(DataError, match="context"):
        pliant.evaluate(model, tasks={"empty": items}, tokenizer=tokenizer)


def test_tasks_are_read_from_files_and_named_after_them(folder, tmp_path):
    rows = [{"context": f"{i}", "choices": ["yes", "no, not ever"], "answer": i % 2} for i in range(6)]
    path = tmp_path / "yes-no.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = pliant.evaluate(pliant.load(folder), tasks=[path], limit=4)
    assert found["perplexity"] == {}
    assert found["tasks"]["yes-no"]["questions"] == 4


def test_a_gzipped_task_is_called_what_it_is_without_the_endings(folder, tmp_path):
    row = {"context": "sun", "choices": ["yes", "no"], "answer": 0}
    path = tmp_path / "yes-no.v2.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert list(pliant.evaluate(pliant.load(folder), tasks=[path])["tasks"]) == ["yes-no.v2"]


def test_the_limit_holds_for_questions_given_by_name(model, tokenizer):
    found = pliant.evaluate(model, tasks={"some": _questions(5)}, limit=3, tokenizer=tokenizer)
    assert found["tasks"]["some"]["questions"] == 3


# continuations


def test_continuations_are_measured_as_lm_eval_measures_lambada(model, tokenizer):
    contexts = ["the moon walks past the", "a green river and", "slowly the", "of sun and mountain, the"]
    written = []
    for context in contexts:  # what the model itself goes on with, three tokens
        ids = tokenizer(context, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=ids**0, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
        written.append(out[0].tolist())
    likely = []
    for ids, context in zip(written, contexts, strict=True):
        text = tokenizer.decode(ids)[len(context) :]
        likely.append(text if tokenizer(context + text)["input_ids"] == ids else None)
    assert any(likely), "some of what the model writes is text that reads back as the same tokens"
    items = [Continuation(c, text or " moon") for c, text in zip(contexts, likely, strict=True)]
    losses = [-_log_likelihood(model, tokenizer, item.context, item.continuation) for item in items]
    found = pliant.evaluate(model, tasks={"lambada": items}, tokenizer=tokenizer)["tasks"]["lambada"]
    share = sum(text is not None for text in likely) / 4
    mean = sum(losses) / 4
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 3)
    assert found == {
        "acc": share,
        "stderr": pytest.approx(math.sqrt(share * (1 - share) / 4)),
        "perplexity": pytest.approx(math.exp(mean), rel=1e-4),
        "stderr_perplexity": pytest.approx(math.exp(mean) * spread / 2, rel=1e-3),
        "questions": 4,
    }
    alone = pliant.evaluate(model, tasks={"one": items[:1]}, tokenizer=tokenizer)["tasks"]["one"]
    assert alone["stderr_perplexity"] is None
    assert alone["perplexity"] == pytest.approx(math.exp(losses[0]), rel=1e-4)


def test_a_continuation_is_not_greedy_when_one_of_its_tokens_is_not(model, tokenizer):
    ids = tokenizer("the moon", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
        model.lm_head.weight[3:259] = 0  # no byte is likelier than another, so the first one wins
        model.lm_head.weight[0:3] = -model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight[259:] = 0
    first = tokenizer.decode([3])
    assert best != 3
    right, wrong = Continuation("the moon", first), Continuation("the moon", first + "b")
    for item, share in ((right, 1.0), (wrong, 0.0)):
        assert pliant.evaluate(model, tasks={"t": [item]}, tokenizer=tokenizer)["tasks"]["t"]["acc"] == share


def test_continuations_are_read_from_a_file_and_compared(folder, tmp_path):
    path = tmp_path / "lambada.jsonl"
    rows = [{"context": f"the moon {i}", "continuation": word} for i, word in enumerate(("walks", " is", "sun"))]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert pliant.questions(path) == [
        Continuation("the moon 0", " walks"),
        Continuation("the moon 1", " is"),
        Continuation("the moon 2", " sun"),
    ]
    a, b = (
        pliant.evaluate(one, tasks=[path], tokenizer=pico_tokenizer(), items=True)
        for one in (pliant.load(folder), pico(seed=3))
    )
    assert a["tasks"]["lambada"]["items"].keys() == {"digest", "acc", "loss"}
    found = pliant.compare(a, b)["tasks"]["lambada"]
    mean = [math.log(one["tasks"]["lambada"]["perplexity"]) for one in (a, b)]
    assert found["loss"]["difference"] == pytest.approx(mean[0] - mean[1])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"context": "the moon", "continuation": " "}, "row 1: the continuation is empty"),
        ({"context": 5, "continuation": "walks"}, "row 1: 'context' must be a string"),
        ({"context": "the moon", "continuation": ["walks"]}, "row 1: 'continuation' must be a string"),
    ],
)
def test_a_continuation_that_cannot_be_used_is_refused(row, told, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), "utf-8")
    with pytest.raises(DataError, match=told):
        pliant.questions(path)


def test_a_continuation_that_the_model_cannot_read_is_refused(model, tokenizer):
    short, long = Continuation("a", " b"), Continuation("a", " b" * 200)
    with pytest.raises(DataError, match="task 't', row 2: the continuation is longer than the 256 positions"):
        pliant.evaluate(model, tasks={"t": [short, long]}, tokenizer=tokenizer)
    with pytest.raises(DataError, match="mixes questions with choices, open questions and continuations"):
        pliant.evaluate(model, tasks={"t": [short, OpenQuestion("a", "b")]}, tokenizer=tokenizer)


# what cannot be measured


@pytest.mark.parametrize("tasks", [(), {}])
def test_nothing_to_measure_is_refused(model, tokenizer, tasks):
    with pytest.raises(DataError, match="nothing to evaluate"):
        pliant.evaluate(model, tasks=tasks, tokenizer=tokenizer)


def test_a_task_without_questions_is_refused_by_name(model, tokenizer):
    with pytest.raises(DataError, match="arc"):
        pliant.evaluate(model, tasks={"arc": []}, tokenizer=tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, prose):
    small = pico("llama", vocab_size=40)
    with pytest.raises(DataError, match="the model knows only 40: this is the tokenizer of another model"):
        pliant.evaluate(small, perplexity=prose, tokenizer=tokenizer, seqlen=16)
    with pytest.raises(DataError, match="the model knows only 40: this is the tokenizer of another model"):
        pliant.evaluate(small, tasks={"some": _questions(2)}, tokenizer=tokenizer)


def _masked():
    """A model that sees the tokens it predicts, with a language model's head."""
    return transformers.BertLMHeadModel(config("bert")).eval()


@pytest.mark.parametrize("make", [_masked, lambda: pico("bert"), lambda: pico("vit")], ids=["masked", "bert", "vit"])
@pytest.mark.parametrize(
    "measure",
    [
        lambda model, tokenizer, prose: pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=32),
        lambda model, tokenizer, _: pliant.evaluate(model, tasks={"some": _questions(2)}, tokenizer=tokenizer),
        lambda model, *_: pliant.bench(model, prompt=4, tokens=1, repeats=1),
        lambda model, tokenizer, prose: pliant.apply(
            model, pliant.FisherPruner(ratio=0.1, samples=4, seqlen=32), prose, tokenizer=tokenizer, progress=False
        ),
        lambda model, tokenizer, prose: pliant.apply(
            model, pliant.BlockPruner(ratio=0.1, samples=4, seqlen=32), prose, tokenizer=tokenizer, progress=False
        ),
    ],
    ids=["perplexity", "questions", "bench", "fisher", "blockpruner"],
)
def test_a_model_that_predicts_no_next_tokens_is_not_measured_by_them(make, measure, tokenizer, prose):
    with pytest.raises(ArchitectureError, match="predicts no next tokens"):
        measure(make(), tokenizer, prose)


@pytest.mark.parametrize("name", DECODERS)
def test_every_causal_family_is_measured(name, tokenizer, prose):
    found = pliant.evaluate(pico(name), perplexity=prose, tokenizer=tokenizer, seqlen=16, windows=2)
    assert math.isfinite(found["perplexity"]["prose.txt"]["loss"])


def test_a_model_that_is_offloaded_is_refused(model, tokenizer, prose):
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(MemoryLimitError, match="offloaded"):
        pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=16)


def test_windows_are_shortened_to_what_the_reference_reads(tokenizer, prose):
    short = pico("gpt2", n_positions=64)
    found = pliant.evaluate(pico("gpt2"), perplexity=prose, tokenizer=tokenizer, reference=short, seqlen=128)
    assert found["perplexity"]["prose.txt"]["seqlen"] == 64


def test_too_little_text_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="one window needs 256"):
        pliant.evaluate(model, perplexity=pliant.text(["short"]), tokenizer=tokenizer)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_put_back(model, tokenizer, prose, training):
    model.train(training)
    pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=16, windows=1)
    assert model.training is training
    with pytest.raises(DataError):
        pliant.evaluate(model, perplexity=pliant.text(["short"]), tokenizer=tokenizer)
    assert model.training is training


def test_a_model_is_measured_in_evaluation_mode(tokenizer, prose):
    model = pico("gpt2")
    expected = pliant.evaluate(model, perplexity=prose, tokenizer=tokenizer, seqlen=32, windows=2)
    found = pliant.evaluate(model.train(), perplexity=prose, tokenizer=tokenizer, seqlen=32, windows=2)
    assert found == expected


# speed


def _ordered(row):
    assert set(row) == {"median", "p10", "p90"}
    return 0 < row["p10"] <= row["median"] <= row["p90"]


def test_bench_gives_rates_of_one_model(model):
    found = pliant.bench(model, prompt=8, tokens=2, repeats=3)
    assert set(found) == {"model", "settings", "threads", "peak_memory", "on"}
    assert set(found["model"]) == {"prefill", "decode"}
    assert all(_ordered(row) for row in found["model"].values())
    assert found["settings"] == {"prompt": 8, "tokens": 2, "batch": 1, "repeats": 3}
    assert found["threads"] == torch.get_num_threads()
    assert found["peak_memory"] > 2**20


def test_bench_times_two_models_in_turn(model):
    other = pico("llama", num_hidden_layers=8)
    calls = []
    for name, one in (("A", model), ("B", other)):
        one.register_forward_hook(lambda *_, name=name: calls.append(name))
    found = pliant.bench(model, other, prompt=8, tokens=2, repeats=2)
    assert calls == (["A"] * 3 + ["B"] * 3) * 3  # a prefill and two tokens each, one round to warm up, two timed
    assert set(found) == {"model", "against", "speedup", "settings", "threads", "peak_memory", "on"}
    for part in ("model", "against", "speedup"):
        assert set(found[part]) == {"prefill", "decode"}
        assert all(_ordered(row) for row in found[part].values())


@pytest.mark.slow
def test_the_speedup_is_that_of_the_model_over_the_other(model):
    found = pliant.bench(model, pico("llama", num_hidden_layers=16), prompt=4, tokens=2, repeats=9)
    assert found["speedup"]["prefill"]["median"] > 1.5
    assert found["speedup"]["decode"]["median"] > 1.5


def test_every_model_of_a_batch_reads_and_decodes_what_was_asked(model):
    shapes = []

    def record(_module, _args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(record, with_kwargs=True)
    pliant.bench(model, prompt=8, tokens=2, batch=3, repeats=1)
    assert shapes == [(3, 8), (3, 1), (3, 1)] * 2


def test_a_prompt_left_out_fits_the_positions(model):
    few = pico("gpt2", n_positions=64)
    found = pliant.bench(few, tokens=32, repeats=1)
    assert found["settings"] == {"prompt": 32, "tokens": 32, "batch": 1, "repeats": 1}
    assert pliant.bench(model, few, tokens=60, repeats=1)["settings"]["prompt"] == 4
    for prompt, tokens in ((None, 64), (40, 32), (None, 100)):
        with pytest.raises(DataError, match=r"are more than the 64 positions of model; give"):
            pliant.bench(few, prompt=prompt, tokens=tokens, repeats=1)


@pytest.mark.parametrize("settings", [{"prompt": 60, "tokens": 8}, {"tokens": 64}])
def test_parts_of_a_token_past_the_positions_are_refused(settings):
    with pytest.raises(DataError, match="are more than the 64 positions of this model"):
        token_time(pico("gpt2", n_positions=64), **{"prompt": 4, **settings})


@pytest.mark.slow
def test_formats_are_compared_of_a_model_with_few_positions():
    few = pico("gpt2", n_positions=64)
    found = pliant.compare_formats(few, repeats=1)
    assert found["settings"] == {"prompt": 32, "tokens": 32, "repeats": 1}
    assert {row["native"] for name, row in found["formats"].items() if name != "float32"} == {False}
    assert "not one of the families with a native run" in found["formats"]["bf16"]["why_not_native"]
    with pytest.raises(DataError, match="50 \\+ 32 tokens are more than the 64 positions"):
        pliant.compare_formats(few, prompt=50)


def test_bench_puts_the_training_mode_back(model):
    pliant.bench(model.train(), prompt=4, tokens=1, repeats=1)
    assert model.training


def test_bench_refuses_more_tokens_than_the_model_has_positions():
    with pytest.raises(PliantError, match="256"):
        pliant.bench(pico("gpt2"), prompt=250, tokens=10, repeats=1)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"prompt": 0}, {"tokens": 0}, {"batch": 0}])
def test_bench_refuses_to_time_nothing(model, wrong):
    with pytest.raises(PliantError, match=next(iter(wrong))):
        pliant.bench(model, model, **{"prompt": 4, "tokens": 1, "repeats": 1} | wrong)
