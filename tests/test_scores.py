"""Scores: those of pliant, and a user's own, through the pruners."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pliant
from pico import pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.data import OpenQuestion, Question
from pliant.elastic import Subnet
from pliant.errors import DataError, StepError, WeightError
from pliant.measure.model_scorer import ModelScorer
from pliant.measure.prefix_scorer import PrefixScorer, footprint
from pliant.measure.scores import Score, score_of
from pliant.measure.scores.answer_match import AnswerMatch
from pliant.measure.scores.choice_accuracy import ChoiceAccuracy
from pliant.measure.scores.class_accuracy import ClassAccuracy
from pliant.prune import Pruner
from pliant.registry import SCORES
from pliant.searches import NSGA2, Limits, Move, Space

WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "looked", "at", "dogs", "that", "ran", "over", "hills"]
TEXT = pliant.text([" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) for i in range(1, 60)])
WINDOWS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(0))
SHARED = {"ratio": 0.1, "samples": 4, "seqlen": 48}
QUESTIONS = [Question("the cat sat on " * i, (" a mat", " red", " dogs"), i % 3) for i in range(1, 9)]


class NextToken(Score):
    name = "next_token"
    label = "next tokens predicted"
    lower_is_better = False

    def batch(self, logits, targets, reference=None):  # noqa: ARG002 - for scores that compare with the dense model
        right = logits[:, : targets.shape[1]].argmax(-1) == targets
        return right.sum().item(), right.numel()


def pruned(step, **options):
    model = pliant.apply(pico("llama"), step, TEXT, tokenizer=tokenizer(), progress=False, **options)
    return model.pliant_history[0]


def test_a_score_of_ones_own_prunes_resumes_and_is_named_in_the_record(tmp_path):
    step = pliant.BlockPruner(**SHARED, metric=NextToken())
    record = pruned(step, work=tmp_path)
    assert record["ratio"] >= 0.1
    assert record["settings"]["metric"] == "test_scores:NextToken"
    for point in record["points"]:
        assert point["label"] == "next tokens predicted"
        assert 0 <= point["score"] <= 1
        assert point["loss"] == -point["score"]
    again = pruned(step, work=tmp_path)
    assert all(stage["evaluations"] == 0 for stage in again["counters"].values())
    assert again["points"] == record["points"]


def test_a_score_of_ones_own_is_what_the_whole_model_gives():
    model = pico("llama")
    cut = Subnet().without("layers.1.mlp")
    with torch.inference_mode(), pliant.activate(model, cut):
        logits = model(WINDOWS).logits
    expected = (logits[:, :-1].argmax(-1) == WINDOWS[:, 1:]).double().mean().item()
    scorer = PrefixScorer(model, anatomy_of(model), WINDOWS, metric=NextToken())
    assert scorer.score(Subnet()) <= 0
    assert scorer.score(cut) == pytest.approx(-expected, abs=1e-9)


class Evolved(Pruner):
    """A pruner of a user: two scores and two costs at once, one of them with a hard limit."""

    kind = "evolved"

    def run(self, job):
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        windows = self.windows(job, self.samples, self.seed)
        space = Space.of(anatomy, {"channels": 8}, [f"layers.{i}.mlp" for i in range(3)])
        size, macs = pruning.cost("parameters"), pruning.cost("macs")
        limits = Limits(((size, (1 - self.ratio) * size(Subnet())),))
        draw = random.Random(self.seed)
        first = [space.sample(draw) for _ in range(8)]
        search = NSGA2(space, first, 32, self.seed, limits, objectives=4)
        with (
            pruning.scoring("loss", windows) as loss,
            pruning.scoring("tokens", windows, metric=NextToken(), beside=loss) as tokens,
        ):
            search.run(lambda subnet: [loss(subnet), tokens(subnet), size(subnet), macs(subnet)])
        job.record["front"] = [list(values) for values in search.seen.values()]
        pruning.commit("loss", Move("all", search.best()), search.seen[search.best()][0])
        pruning.cut()


def test_several_scores_and_costs_are_searched_at_once_within_hard_limits(tmp_path):
    step = Evolved(**SHARED)
    record = pruned(step, work=tmp_path)
    assert record["ratio"] >= 0.1
    dense = sum(p.numel() for p in pico("llama").parameters())
    assert all(size <= 0.9 * dense for _, _, size, _ in record["front"])
    again = pruned(step, work=tmp_path)
    assert again["front"] == record["front"]
    assert all(stage["evaluations"] == 0 for stage in again["counters"].values())
    # each score is what it is alone
    model = pico("llama")
    anatomy = anatomy_of(model)
    windows = TEXT.sample(4, 42).windows(tokenizer(), 48)
    cut = Subnet.from_dict(record["subnet"])
    alone = [PrefixScorer(model, anatomy, windows, metric=m) for m in ("perplexity", NextToken())]
    assert record["points"][-1]["loss"] == pytest.approx(alone[0].score(cut), abs=1e-6)
    alone[0].close()
    best = next(row for row in record["front"] if row[0] == record["points"][-1]["loss"])
    assert best[1] == pytest.approx(alone[1].score(cut), abs=1e-9)


def test_names_resolve_through_one_table_and_objects_are_themselves():
    own = NextToken()
    assert score_of(own) is own
    assert {name: score_of(name).name for name in SCORES} == {"perplexity": "perplexity", "kl": "kl"}
    with pytest.raises(
        StepError, match="unknown metric 'taste'; choose from: perplexity, kl, or name your own as module:Name"
    ):
        score_of("taste")
    with pytest.raises(StepError, match="unknown metric 'taste'"):
        pliant.BlockPruner(ratio=0.1, metric="taste")


def test_perplexity_shows_the_exponential_of_its_loss_and_never_overflows():
    assert score_of("perplexity").shown(math.log(12.5)) == pytest.approx(12.5)
    assert math.isfinite(score_of("perplexity").shown(1e4))
    assert score_of("kl").shown(0.25) == 0.25
    assert NextToken().shown(NextToken().loss(0.75)) == 0.75


def test_a_reference_takes_logits_twice():
    model = pico("llama")
    one, two = (footprint(model, anatomy_of(model), WINDOWS, name).logits for name in ("perplexity", "kl"))
    assert two == 2 * one


@pytest.mark.parametrize(
    "score",
    [
        ChoiceAccuracy(QUESTIONS),
        ChoiceAccuracy(QUESTIONS, per_character=True),
        AnswerMatch([OpenQuestion("the cat " * 3, "sat")] * 4, max_new_tokens=3),
    ],
    ids=lambda score: score.key.rpartition(":")[0],
)
def test_scores_with_questions_prune_too_and_agree_with_evaluate(score, tmp_path):
    model = pico("llama")
    scorer = ModelScorer(model, anatomy_of(model), score, tokenizer)
    found = scorer.score(Subnet())
    figures = pliant.evaluate(pico("llama"), tasks={"t": score.questions}, tokenizer=tokenizer(), max_new_tokens=3)
    assert score.shown(found) == figures["tasks"]["t"][getattr(score, "figure", "match")]
    scorer.score(Subnet().without("layers.1.mlp"))
    scorer.close()
    assert scorer.evaluations == 2
    assert all(tensor.equal(pico("llama").state_dict()[name]) for name, tensor in model.state_dict().items())
    step = pliant.OneShot(**SHARED, by="perplexity", metric=score)
    record = pruned(step, work=tmp_path)
    assert record["settings"]["metric"] == {
        "score": f"{type(score).__module__}:{type(score).__name__}",
        "key": score.key,
    }
    with pytest.raises(StepError, match=f"the score .*{type(score).__name__} was made in Python"):
        pliant.step_of(record["settings"])
    again = pruned(step, work=tmp_path)
    assert all(stage["evaluations"] == 0 for stage in again["counters"].values())


def test_another_set_of_questions_is_another_score():
    assert ChoiceAccuracy(QUESTIONS).key != ChoiceAccuracy(QUESTIONS[1:]).key
    assert ChoiceAccuracy(QUESTIONS).key == ChoiceAccuracy(list(QUESTIONS)).key
    inputs = torch.eye(3)
    labels = torch.tensor([0, 1, 2])
    assert ClassAccuracy([(inputs, labels)]).key != ClassAccuracy([(inputs, labels.flip(0))]).key
    for empty in (ChoiceAccuracy, AnswerMatch, ClassAccuracy):
        with pytest.raises(DataError, match="needs at least one"):
            empty([])


def test_class_accuracy_is_the_share_of_examples_classified_rightly():
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    inputs, labels = torch.eye(3), torch.tensor([0, 1, 1])
    assert ClassAccuracy([(inputs, labels), (inputs[:1], labels[:1])]).measure(model) == (3, 4)

    class Named(nn.Linear):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=super().forward(pixel_values))

    named = Named(3, 3, bias=False)
    named.load_state_dict(model.state_dict())
    assert ClassAccuracy([({"pixel_values": inputs}, labels)]).measure(named) == (2, 3)


class Uncounted(Score):
    def batch(self, *_):
        return 0.0, 0


def test_a_score_that_counts_nothing_is_refused_by_name():
    with pytest.raises(WeightError, match="the score uncounted counted 0 things"):
        pliant.apply(
            pico("llama"),
            pliant.BlockPruner(ratio=0.1, samples=4, seqlen=16, metric=Uncounted()),
            TEXT,
            tokenizer=tokenizer(),
        )
