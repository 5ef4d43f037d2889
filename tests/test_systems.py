"""BlockPruner and MultiPruner from end to end, on models of every architecture."""

import dataclasses
import math

import pytest
import torch

import pliant
from pico import LAYOUTS, leader, pico
from pliant.anatomy import anatomy_of, layers_of
from pliant.architecture import Part, catalogue
from pliant.elastic import Subnet, parameters, ratio
from pliant.errors import DataError, PliantError, RatioError, StepError, WeightError
from pliant.progress import Progress
from pliant.searches import SpaceSearch

SMALL = {"samples": 4, "seqlen": 24, "seed": 3}
WIDTHS = {"width_samples": 3, "mlp_group": 12}


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


@pytest.fixture
def prune(prose, tokenizer):
    """Apply a step to a model and return it."""

    def applied(model, step, **options):
        return pliant.apply(model, step, pliant.text(prose), tokenizer=tokenizer, progress=False, **options)

    return applied


def multi(ratio=0.35, name="llama", **settings):
    """The step; where a family's heads cannot be cut, channels have the share of the heads, too."""
    if not has_heads(name):
        blocks, channels, heads = map(int, settings.get("split", "44:52:4").split(":"))
        settings["split"] = f"{blocks}:{channels + heads}:0"
    return pliant.MultiPruner(ratio=ratio, **SMALL | WIDTHS | settings)


def has_heads(name):
    return catalogue()[name].axes[leader(name)].cut


def stages(name):
    return ("blocks", "mlp channels", "attention heads") if has_heads(name) else ("blocks", "mlp channels")


def by_channel(model, layer):
    """The matrix that reads the channels of an MLP, one row a channel; of experts, a stack of such matrices each."""
    anatomy = anatomy_of(model)
    weights = anatomy.blocks[f"layers.{layer}.mlp"].weights
    (down,) = (w for w in weights if w.reads is not None and w.dims[w.reads] == (Part("channels"),))
    return layers_of(model, anatomy.architecture)[layer].get_parameter(down.path).movedim(down.reads, 0)


def blocks(ratio=0.25, **settings):
    return pliant.BlockPruner(ratio=ratio, **SMALL | settings)


def told(model):
    return model.pliant_history[0]


def units(model, stage=None):
    return [point["unit"] for point in told(model)["points"] if stage in (None, point["stage"])]


def ratios(model, stage):
    return [point["ratio"] for point in told(model)["points"] if point["stage"] == stage]


def frozen(model):
    """Everything about a model that an applied step changes."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}, model.config.to_dict()


def unchanged(model, before):
    tensors, config = before
    now = model.state_dict()
    return (
        now.keys() == tensors.keys()
        and all(torch.equal(now[key], tensor) for key, tensor in tensors.items())
        and model.config.to_dict() == config
        and not hasattr(model, "pliant_history")
    )


def identical(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def loss_on(model, prose, tokenizer, samples, seed):
    windows = pliant.text(prose).sample(samples, seed).windows(tokenizer, SMALL["seqlen"])
    with torch.inference_mode():
        predicted = model(input_ids=windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return -predicted.gather(-1, windows[:, 1:, None]).mean().item()


# What comes out


def test_multipruner_stops_each_stage_at_the_first_ratio_of_its_share(name, prune):
    model = pico(name)
    dense = sum(p.numel() for p in model.parameters())
    anatomy = anatomy_of(model)
    prune(model, multi(name=name, split="44:46:10"))
    reached = 0.0
    shares = (0.35 * 0.44, 0.35 * 0.9, 0.35) if has_heads(name) else (0.35 * 0.44, 0.35)
    for stage, until in zip(stages(name), shares, strict=True):
        after = ratios(model, stage)
        assert after, stage
        assert all(r < until for r in [reached, *after[:-1]])
        reached = after[-1]
        assert reached >= until
    last = anatomy.axes[f"layers.3.attention.{leader(name)}" if has_heads(name) else "layers.3.mlp.channels"]
    fewer = last.size - (1 if has_heads(name) else WIDTHS["mlp_group"])
    unit = parameters(anatomy) - parameters(anatomy, Subnet().keeping(last.name, fewer))
    assert 0.35 <= reached < 0.35 + unit / dense
    assert 1 - sum(p.numel() for p in model.parameters()) / dense == pytest.approx(reached, abs=1e-12)
    assert reached == told(model)["ratio"]
    assert told(model)["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert ratio(anatomy, Subnet.from_dict(told(model)["subnet"])) == reached


@pytest.mark.parametrize(
    ("split", "stages"), [("0:1:0", {"mlp channels"}), ("1:0:0", {"blocks"}), ("30:70:0", {"blocks", "mlp channels"})]
)
def test_a_stage_without_a_share_is_left_out(split, stages, prune, model):
    prune(model, multi(0.2, split=split))
    assert {point["stage"] for point in told(model)["points"]} == stages == set(told(model)["counters"])
    assert told(model)["ratio"] >= 0.2
    assert told(model)["points"][-2]["ratio"] < 0.2


def test_blockpruner_stops_at_the_first_ratio_that_is_enough(name, prune):
    model = pico(name)
    prune(model, blocks(0.25))
    after = ratios(model, "blocks")
    assert after[-1] >= 0.25
    assert all(r < 0.25 for r in after[:-1])
    assert {*units(model)} == {*told(model)["subnet"]["skip"]}
    assert told(model)["subnet"]["keep"] == {}


def test_a_larger_ratio_of_blockpruner_removes_the_same_blocks_first(name, prune):
    small, large = pico(name), pico(name)
    anatomy = anatomy_of(small)
    largest = max(block.parameters({}) for block in anatomy.blocks.values()) / parameters(anatomy)
    prune(small, blocks(0.25, search="exact"))
    prune(large, blocks(0.4, search="exact"))
    # near the end one may be taken whose size fits the ratio
    free = sum(before < 0.25 - largest for before in [0, *ratios(small, "blocks")][:-1])
    assert len(units(large)) > len(units(small)) >= free >= 1
    assert units(large)[:free] == units(small)[:free]


def test_naive_and_exact_search_decide_the_same_in_all_three_stages(name, prune):
    naive, exact = pico(name), pico(name)
    for model, search in ((naive, "naive"), (exact, "exact")):
        prune(model, multi(name=name, split="44:46:10", search=search))
    assert units(naive) == units(exact)
    assert {point["stage"] for point in told(exact)["points"]} == {*stages(name)}
    for a, b in zip(told(naive)["points"], told(exact)["points"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert identical(naive, exact)
    for stage, counters in told(exact)["counters"].items():
        assert counters["evaluations"] == told(naive)["counters"][stage]["evaluations"]
        assert counters["block_forwards"] < told(naive)["counters"][stage]["block_forwards"]


def test_the_lazy_search_evaluates_less(name, prune):
    lazy, exact = (pico(name, num_hidden_layers=6) for _ in range(2))  # in fewer layers nearly all are looked at
    prune(lazy, multi(name=name, search="lazy"))
    prune(exact, multi(name=name, search="exact"))
    assert told(lazy)["evaluations"] < told(exact)["evaluations"]
    assert told(lazy)["ratio"] >= 0.35


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gemma3_text"])
def test_the_head_stage_removes_whole_key_value_groups(name, prune):
    model = pico(name)
    prune(model, multi(0.12, split="0:0:1", head_group=1))
    narrowed = set(units(model))
    assert len(narrowed) > 1
    for i, layer in enumerate(model.model.layers):
        kept = told(model)["subnet"]["keep"].get(f"layers.{i}.attention.kv", 3)
        attention = layer.self_attn
        if name == "phi3":
            assert attention.qkv_proj.weight.shape[0] == kept * (2 + 1 + 1) * 8
        else:
            assert attention.q_proj.weight.shape[0] == kept * 2 * 8
            assert attention.k_proj.weight.shape[0] == attention.v_proj.weight.shape[0] == kept * 8
        assert attention.o_proj.weight.shape[1] == kept * 2 * 8
        assert (kept < 3) == (f"layers.{i}.attention.kv" in narrowed)


@pytest.mark.parametrize(("kind", "other"), [("attention", "mlp"), ("mlp", "attention")])
def test_blocks_of_one_kind_leave_the_other_kind_alone(kind, other, name, prune):
    model = pico(name)
    anatomy = anatomy_of(model)
    prune(model, blocks(0.1, blocks=kind))
    assert units(model)
    assert all(unit.endswith(kind) for unit in units(model))
    before, after = (layers_of(m, anatomy.architecture) for m in (pico(name), model))
    kept = [(block.layer, w.path) for block in anatomy.blocks.values() if block.kind == other for w in block.weights]
    assert kept
    assert all(torch.equal(after[layer].get_parameter(p), before[layer].get_parameter(p)) for layer, p in kept)


def test_multipruner_leaves_the_least_important_units_out(name, prune):
    """With one stage, what is kept of a block are its units of largest norm."""
    from pliant.criteria import l1_orders

    model, dense = pico(name), pico(name)
    orders = l1_orders(dense, anatomy_of(dense))
    prune(model, multi(0.1, split="0:1:0"))
    keep = told(model)["subnet"]["keep"]
    assert keep
    for layer in range(4):
        expected = by_channel(dense, layer)
        for place, short in enumerate(("channels", "experts") if name == "mixtral" else ("channels",)):
            axis = f"layers.{layer}.mlp.{short}"
            expected = expected.index_select(place, orders[axis][: keep.get(axis)])
        assert torch.equal(by_channel(model, layer), expected)


def test_without_reordering_the_last_channels_go(name, prune):
    model, dense = pico(name), pico(name)
    prune(model, multi(0.1, split="0:1:0", order="stored"))
    keep = told(model)["subnet"]["keep"]
    assert keep
    for layer in range(4):
        before = by_channel(dense, layer)[: keep.get(f"layers.{layer}.mlp.channels")]
        expected = before[:, : keep.get(f"layers.{layer}.mlp.experts")] if name == "mixtral" else before
        assert torch.equal(by_channel(model, layer), expected)


def test_the_last_loss_scored_is_that_of_the_cut_model(name, prune, prose, tokenizer):
    model = pico(name)
    prune(model, multi(name=name))
    assert told(model)["points"][-1]["stage"] == stages(name)[-1]
    assert loss_on(model, prose, tokenizer, 3, 3) == pytest.approx(told(model)["points"][-1]["loss"], abs=1e-5)
    assert told(model)["points"][-1]["score"] == pytest.approx(math.exp(told(model)["points"][-1]["loss"]))
    model = pico(name)
    prune(model, blocks())
    assert loss_on(model, prose, tokenizer, 4, 3) == pytest.approx(told(model)["points"][-1]["loss"], abs=1e-5)


def test_the_widths_sample_is_drawn_first_and_the_blocks_sample_after_it(prune, prose, tokenizer, model):
    prune(model, multi(0.1, split="1:0:0"))
    assert loss_on(model, prose, tokenizer, 4, 4) == pytest.approx(told(model)["points"][-1]["loss"], abs=1e-5)


def test_the_divergence_from_the_dense_model_can_choose_too(name, prune):
    model = pico(name)
    prune(model, multi(name=name, metric="kl"))
    points = told(model)["points"]
    assert points[-1]["ratio"] >= 0.35
    assert all(point["loss"] > 0 for point in points)
    assert all(point["score"] == point["loss"] for point in points)


@pytest.mark.parametrize("step", [multi, blocks])
def test_the_same_seed_gives_the_same_model_twice(step, name, prune):
    one, other = pico(name), pico(name)
    for model in (one, other):
        prune(model, multi(name=name) if step is multi else blocks())
    assert identical(one, other)
    assert told(one)["points"] == told(other)["points"]


def test_another_seed_draws_other_text(prune):
    one, other = pico(), pico()
    prune(one, blocks())
    prune(other, blocks(seed=4))
    assert told(one)["points"][0]["loss"] != told(other)["points"][0]["loss"]


# Resuming


@pytest.mark.parametrize("step", [multi, blocks])
@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_the_same_run_again_evaluates_nothing_and_gives_the_same_model(step, metric, prune, tmp_path):
    first, second = pico(), pico()
    prune(first, step(metric=metric), work=tmp_path / "work")
    prune(second, step(metric=metric), work=tmp_path / "work")
    assert all(stage["evaluations"] > 0 for stage in told(first)["counters"].values())
    for stage, counters in told(second)["counters"].items():
        assert counters["evaluations"] == 0
        assert counters["replayed"] == counters["scores"] == told(first)["counters"][stage]["scores"]
    assert told(first)["points"] == told(second)["points"]
    assert identical(first, second)


def test_a_larger_ratio_goes_on_from_the_scores_of_a_smaller_one(prune, tmp_path):
    prune(pico(), blocks(0.15), work=tmp_path)
    model, alone = pico(), pico()
    prune(model, blocks(0.3), work=tmp_path)
    prune(alone, blocks(0.3))
    counters = told(model)["counters"]["blocks"]
    assert 0 < counters["evaluations"] < told(alone)["counters"]["blocks"]["evaluations"]
    assert counters["replayed"] > 8
    assert identical(model, alone)


def test_scores_of_another_model_are_refused_and_the_model_is_left_alone(prune, tmp_path):
    prune(pico(), blocks(), work=tmp_path)
    other = pico(seed=1)
    before = frozen(other)
    with pytest.raises(PliantError, match=r"belongs to another search.*model: "):
        prune(other, blocks(), work=tmp_path)
    assert unchanged(other, before)


class Stopped(Progress):
    """Presses Ctrl-C after so many scores."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def emit(self, event, **_):
        self.left -= event == "step"
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [3, 20])
def test_an_interrupted_run_leaves_the_model_as_it_was_and_goes_on_with_it(after, prune, tmp_path, prose, tokenizer):
    model, straight = pico(), pico()
    before = frozen(model)
    with pytest.raises(KeyboardInterrupt):
        pliant.apply(model, multi(), pliant.text(prose), tokenizer=tokenizer, work=tmp_path, progress=Stopped(after))
    assert unchanged(model, before)
    prune(model, multi(), work=tmp_path)
    prune(straight, multi())
    assert identical(model, straight)
    assert sum(c["replayed"] for c in told(model)["counters"].values()) > after


# What is refused


@pytest.mark.parametrize("step", [pliant.MultiPruner, pliant.BlockPruner])
@pytest.mark.parametrize("wrong", [0, -0.1, 1, 1.5, math.nan, math.inf, True, "0.2", None])
def test_a_ratio_that_means_nothing_is_refused(step, wrong):
    with pytest.raises(RatioError, match=r"ratio must be a number between 0 and 1 \(exclusive\); not"):
        step(ratio=wrong)


@pytest.mark.parametrize(
    "step",
    [
        multi(0.9),
        multi(0.9, split="0:1:0"),
        multi(0.5, split="0:0:1"),
        multi(0.5, split="0:1:0", mlp_group=47),
        multi(0.9, order="stored"),
        blocks(0.9),
        blocks(0.3, blocks="attention"),
    ],
    ids=lambda step: f"{step.kind}-{step.ratio}",
)
@pytest.mark.parametrize("keep", [True, False], ids=["work", "no work"])
def test_a_ratio_that_cannot_be_reached_is_refused_before_anything_is_done(step, keep, prune, model, tmp_path):
    before = frozen(model)
    with pytest.raises(RatioError, match="cannot be reached"):
        prune(model, step, **({"work": tmp_path / "work"} if keep else {}))
    assert unchanged(model, before)
    assert not (tmp_path / "work").exists()


def test_where_the_last_stage_runs_dry_what_is_left_of_the_others_goes(prune, model):
    """Blocks could reach the ratio alone, but their share is small, and the widths after them have not enough."""
    prune(model, multi(0.6, split="5:90:5"))
    assert told(model)["ratio"] >= 0.6
    assert any(".channels" not in unit and ".kv" not in unit for unit in units(model, "all kinds"))


def test_a_recipe_may_search_twice_and_goes_on_with_both(prune, tmp_path):
    recipe = [blocks(0.1), multi(0.2)]
    first, again = (prune(pico(), recipe, work=tmp_path) for _ in range(2))
    assert {path.parent.name[:2] for path in tmp_path.glob("*/search.jsonl")} == {"1-", "2-"}
    assert identical(first, again)
    made = [counters["evaluations"] for step in again.pliant_history for counters in step["counters"].values()]
    assert made
    assert not any(made)


@pytest.mark.parametrize(
    "split", ["", "44:56", "44:52:4:0", "a:b:c", "44;52;4", "-1:50:51", "0:0:0", "nan:1:1", "inf:1:1", None, 44]
)
def test_a_split_that_is_no_three_shares_is_refused(split):
    with pytest.raises(StepError, match=r"split (must be a text|.* such as 44:52:4); not"):
        multi(split=split)


@pytest.mark.parametrize(
    ("step", "setting", "told"),
    [
        (multi, {"mlp_group": 0}, "mlp_group must be a whole number of at least 1"),
        (multi, {"head_group": 0}, "head_group must be a whole number of at least 1"),
        (multi, {"width_samples": 0}, "width_samples must be a whole number of at least 1"),
        (multi, {"samples": 0}, "samples must be a whole number of at least 1"),
        (multi, {"seqlen": 1}, "seqlen must be a whole number of at least 2"),
        (multi, {"metric": "accuracy"}, "unknown metric 'accuracy'; choose from: perplexity, kl, or name your own"),
        (multi, {"search": "random"}, "search must be one of lazy, .*; not 'random'"),
        (multi, {"slack": -1.0}, "slack must be a number from 0 to 1; not -1.0"),
        (multi, {"refresh": -1}, "refresh must be a whole number of at least 0; not -1"),
        (blocks, {"blocks": "layers"}, "blocks must be one of mix, attention, mlp; not 'layers'"),
    ],
)
def test_a_setting_outside_what_it_can_be_is_refused(step, setting, told):
    with pytest.raises(StepError, match=told):
        step(**setting)


@pytest.mark.parametrize("step", [multi(), blocks()], ids=lambda step: step.kind)
def test_without_calibration_text_the_model_is_left_alone(step, model, tokenizer):
    before = frozen(model)
    with pytest.raises(DataError, match="needs calibration text"):
        pliant.apply(model, step, tokenizer=tokenizer, progress=False)
    assert unchanged(model, before)


@pytest.mark.parametrize("step", [multi(), blocks()], ids=lambda step: step.kind)
@pytest.mark.parametrize("text", [["too short"], ["a" * 80]])
def test_text_shorter_than_a_window_is_refused_and_the_model_left_alone(step, text, model, tokenizer):
    step = dataclasses.replace(step, seqlen=100)
    before = frozen(model)
    with pytest.raises(DataError, match="one window needs 100"):
        pliant.apply(model, step, pliant.text(text), tokenizer=tokenizer, progress=False)
    assert unchanged(model, before)


def test_windows_longer_than_the_model_reads_are_refused(prune, model):
    before = frozen(model)
    with pytest.raises(DataError, match="longer than the 256 positions"):
        prune(model, multi(seqlen=257))
    assert unchanged(model, before)


@pytest.mark.parametrize("step", [multi(), blocks()], ids=lambda step: step.kind)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_weight_is_named_and_nothing_is_done(step, bad, name, prune):
    model = pico(name)
    tensor = next(key for key, value in model.named_parameters() if ".2." in key and value.dim() > 1)
    with torch.no_grad():
        model.get_parameter(tensor).view(-1)[5] = bad
    before = frozen(model)
    with pytest.raises(WeightError, match=rf"{tensor} holds 1 value"):
        prune(model, step)
    assert all(torch.equal(now, before[0][key]) or key == tensor for key, now in model.state_dict().items())
    assert model.config.to_dict() == before[1]


@pytest.mark.parametrize("step", [multi(), blocks()], ids=lambda step: step.kind)
def test_weights_that_are_finite_but_give_no_finite_loss_leave_the_model_as_it_was(step, prune, model):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e37)
        model.model.norm.weight.mul_(1e10)
    before = frozen(model)
    with pytest.raises(WeightError, match="loss"):
        prune(model, step)
    assert unchanged(model, before)


class Nothing(SpaceSearch):
    def candidates(self):
        yield from ()


def test_an_evolution_by_a_search_that_asks_for_nothing_says_so(prune):
    step = pliant.MultiPrunerEvol(ratio=0.1, width_search=f"{__name__}:Nothing", samples=4, width_samples=4, seqlen=16)
    with pytest.raises(RatioError, match="the search test_systems:Nothing asked for no sub-network"):
        prune(pico("llama"), step)
