"""Scores with everything re-used are the plain losses of the model, and only what must run runs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pliant
from pico import DECODERS, LAYOUTS, VOCABULARY, fitted, leader, pico, subnets
from pliant.anatomy import anatomy_of, layers_of
from pliant.elastic import Subnet
from pliant.errors import StepError
from pliant.forward import windows as windowing
from pliant.measure.prefix_scorer import PrefixScorer, store_bytes

WINDOWS = torch.randint(3, 259, (5, 8), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def three_batches(monkeypatch):
    """Two windows at a time, so that batches of different size take part in every test."""
    monkeypatch.setattr(windowing, "TOKENS_AT_ONCE", 16)


def few(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def log_probabilities(model, subnet, windows=WINDOWS):
    with torch.inference_mode(), pliant.activate(model, subnet):
        return model(input_ids=windows, use_cache=False).logits.double().log_softmax(-1)


def plain_loss(model, subnet):
    """Cross-entropy written out, in float64, from one plain forward over all windows."""
    predicted = log_probabilities(model, subnet)[:, :-1]
    return -predicted.gather(-1, WINDOWS[:, 1:, None]).mean().item()


def plain_kl(model, subnet):
    ours, theirs = log_probabilities(model, subnet), log_probabilities(model, Subnet())
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


def state(model):
    """What a model is: its tensors, and which objects and plain values hang at which name."""
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    objects = {name: id(module) for name, module in model.named_modules()}
    objects |= {key: id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)}
    plain = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) or key == "config"
    }
    return tensors, objects, plain


def same(before, after):
    tensors, *rest = before
    tensors_now, *rest_now = after
    return (
        rest == rest_now
        and tensors.keys() == tensors_now.keys()
        and all(torch.equal(tensor, tensors_now[key]) for key, tensor in tensors.items())
    )


def mixture(name):
    cut = (
        Subnet()
        .without("layers.0.attention")
        .without("layers.2.mlp")
        .keeping("layers.1.mlp.channels", 20)
        .keeping("layers.3.mlp.experts", 3)
        .keeping(f"layers.3.attention.{leader(name)}", 2)
    )
    return fitted(cut, anatomy_of(pico(name)))


@pytest.mark.parametrize("name", DECODERS)
@few(2)
@given(data=st.data())
def test_scores_are_the_plain_losses_whatever_is_scored_and_rebased_in_whatever_order(name, data):
    model = pico(name)
    anatomy = anatomy_of(model)
    plain = pico(name)
    metric = data.draw(st.sampled_from(["perplexity", "kl"]))
    memory = data.draw(st.sampled_from([None, 0, store_bytes(model, anatomy, WINDOWS.numel()) // 2]))
    reusing = PrefixScorer(model, anatomy, WINDOWS, metric=metric, memory=memory)
    repeating = PrefixScorer(pico(name), anatomy, WINDOWS, metric=metric, reuse=False)
    pool = [Subnet(), *data.draw(st.lists(subnets(anatomy), min_size=2, max_size=3))]
    for _ in range(data.draw(st.integers(2, 6))):
        subnet = data.draw(st.sampled_from(pool))
        if data.draw(st.booleans()):
            reusing.rebase(subnet)
            repeating.rebase(subnet)
        free = [b.name for b in anatomy.blocks.values() if b.kind == "mlp" or b.layer < 2]
        neighbour = subnet.without(data.draw(st.sampled_from(free)))  # shares what lies before that block
        for scored in (subnet, neighbour):
            expected = (plain_kl if metric == "kl" else plain_loss)(plain, scored)
            assert reusing.score(scored) == pytest.approx(expected, abs=1e-6)
            assert repeating.score(scored) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_reuse_changes_no_bit_of_a_score(name):
    model, other = pico(name), pico(name)
    anatomy = anatomy_of(model)
    reusing, repeating = PrefixScorer(model, anatomy, WINDOWS), PrefixScorer(other, anatomy, WINDOWS, reuse=False)
    base = Subnet()
    for block in ("layers.2.mlp", "layers.0.attention", "layers.3.mlp"):
        candidates = [base.without(b.name) for b in anatomy.blocks.values() if b.name not in base.skip and b.layer < 3]
        candidates = [c for c in candidates if sum(name.endswith("attention") for name in c.skip) < 2]
        assert [reusing.score(c) for c in candidates] == [repeating.score(c) for c in candidates]
        base = base.without(block)
        reusing.rebase(base)
        repeating.rebase(base)
    assert reusing.block_forwards < repeating.block_forwards
    assert reusing.evaluations == repeating.evaluations


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_with_less_memory_the_scores_are_the_same_and_fewer_hidden_states_are_kept(name, kept):
    model = pico(name)
    anatomy = anatomy_of(model)
    whole = store_bytes(model, anatomy, WINDOWS.numel())
    free, limited = (
        PrefixScorer(pico(name), anatomy, WINDOWS),
        PrefixScorer(model, anatomy, WINDOWS, memory=whole * kept // anatomy.depth),
    )
    base = Subnet().without("layers.1.mlp")
    for walk in (free, limited):
        walk.rebase(base)
    for candidate in (base, base.without("layers.3.mlp"), base.without("layers.0.mlp"), base.without("layers.2.mlp")):
        assert limited.score(candidate) == free.score(candidate)
        held = sum(hidden.nbytes for batch in limited._hidden for hidden in batch.values())
        assert held <= whole * kept // anatomy.depth
    limited.score(base)
    assert sum(hidden.nbytes for batch in limited._hidden for hidden in batch.values()) == whole * kept // anatomy.depth
    assert (limited.block_forwards > free.block_forwards) == (kept < anatomy.depth)


class Runs:
    """How often each block module of a model ran, counted from outside."""

    def __init__(self, model, anatomy):
        self.count = 0
        layers = layers_of(model, anatomy.architecture)
        for block in anatomy.blocks.values():
            layers[block.layer].get_submodule(block.spec.module).register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
@pytest.mark.parametrize("options", [{}, {"reuse": False}, {"memory": 0}], ids=["reuse", "no reuse", "no memory"])
def test_block_forwards_counts_exactly_what_ran(name, metric, options):
    model = pico(name)
    anatomy = anatomy_of(model)
    runs = Runs(model, anatomy)
    walk = PrefixScorer(model, anatomy, WINDOWS, metric=metric, **options)
    batches = 3
    assert len(walk.batches) == batches
    assert walk.block_forwards * batches == runs.count
    base = mixture(name)
    for candidate in (Subnet(), base, base.without("layers.3.mlp"), base.without("layers.0.mlp")):
        walk.score(candidate)
        assert walk.block_forwards * batches == runs.count
    walk.rebase(base)
    for candidate in (base.without("layers.3.mlp"), base.without("layers.1.mlp"), base):
        walk.score(candidate)
        assert walk.block_forwards * batches == runs.count
    assert walk.evaluations == 7
    walk.close()
    assert walk.block_forwards * batches == runs.count


def test_the_divergence_of_the_dense_model_from_itself_is_0_and_of_any_other_positive(name):
    model = pico(name)
    walk = PrefixScorer(model, anatomy_of(model), WINDOWS, metric="kl")
    assert walk.score(Subnet()) == 0
    cut = walk.score(mixture(name))
    assert cut > 1e-3
    walk.rebase(mixture(name))
    assert walk.score(mixture(name)) == cut
    assert walk.score(Subnet()) == 0


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
@pytest.mark.parametrize("reuse", [True, False])
def test_after_closing_the_model_is_as_before_bit_for_bit(name, metric, reuse):
    model = pico(name)
    before = state(model)
    dense = log_probabilities(model, Subnet())
    walk = PrefixScorer(model, anatomy_of(model), WINDOWS, metric=metric, reuse=reuse)
    walk.rebase(mixture(name))
    walk.score(mixture(name).without("layers.3.mlp"))
    assert not same(before, state(model))
    walk.close()
    assert same(before, state(model))
    assert torch.equal(log_probabilities(model, Subnet()), dense)
    assert not any(walk._hidden)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_after_a_forward_that_raises_closing_puts_the_model_back_too(name, layer):
    model = pico(name)
    anatomy = anatomy_of(model)
    before = state(model)
    walk = PrefixScorer(model, anatomy, WINDOWS)
    walk.rebase(mixture(name))
    walk.score(mixture(name))
    candidate = fitted(mixture(name).without("layers.1.mlp").keeping("layers.0.mlp.channels", 5), anatomy)
    expected = plain_loss(pico(name), candidate)

    def fail(*_):
        raise MemoryError("no room")

    handle = layers_of(model, anatomy.architecture)[layer].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        walk.score(candidate)
    handle.remove()
    assert walk.score(candidate) == pytest.approx(expected, abs=1e-6)
    handle = layers_of(model, anatomy.architecture)[layer].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        walk.score(candidate)
    handle.remove()
    walk.close()
    assert same(before, state(model))


def test_gradients_still_flow_after_a_walk_is_closed(name):
    model = pico(name)
    walk = PrefixScorer(model, anatomy_of(model), WINDOWS)
    walk.score(mixture(name))
    walk.close()
    model(input_ids=WINDOWS, labels=WINDOWS, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_broken_weights_score_nan(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    with torch.no_grad():
        inside = anatomy.blocks["layers.3.mlp"].weights[0].path
        layers_of(model, anatomy.architecture)[3].get_parameter(inside).fill_(float("nan"))
    walk = PrefixScorer(model, anatomy, WINDOWS)
    assert walk.score(Subnet()) != walk.score(Subnet())
    assert walk.score(Subnet().without("layers.3.mlp")) == pytest.approx(
        plain_loss(pico(name), Subnet().without("layers.3.mlp")), abs=1e-6
    )


def test_an_unknown_metric_is_refused_and_the_known_ones_are_named():
    model = pico()
    with pytest.raises(StepError, match="unknown metric 'accuracy'; choose from: perplexity, kl, or name your own"):
        PrefixScorer(model, anatomy_of(model), WINDOWS, metric="accuracy")


def test_every_window_weighs_the_same_also_in_a_smaller_last_batch():
    model = pico()
    walk = PrefixScorer(model, anatomy_of(model), WINDOWS)
    each = [PrefixScorer(model, anatomy_of(model), window[None]).score(Subnet()) for window in WINDOWS]
    assert walk.score(Subnet()) == pytest.approx(sum(each) / 5, abs=1e-6)
    assert max(each) - min(each) > 0.01
    assert int(WINDOWS.max()) < VOCABULARY
