"""A natively run model computes the same as transformers, after any change to it and with any arguments."""

import contextlib
import copy
import functools
import types

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pliant
from pico import IDS, pico
from pliant.compat.cache_argument import cache_argument
from pliant.compat.native import Native, plan_of
from pliant.compat.native_check import run_natively
from pliant.compat.watch import Watch
from pliant.errors import PackedError
from pliant.runtime import library
from pliant.runtime.packed_linear import Packed

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.state())
PROMPT = torch.arange(3, 15)[None]


def packed(name="llama", format="bf16", seed=0, **overrides):
    step = pliant.PackedLinear(format=format, head="auto")
    model = pliant.apply(pico(name, seed=seed, **overrides), step, progress=False)
    assert isinstance(model.base_model, Native), model.pliant_history[-1]["why_not_native"]
    return model


@contextlib.contextmanager
def by_transformers(model):
    """The same model, run by the class of transformers."""
    base = model.base_model
    native = type(base)
    base.__class__ = native.__mro__[2]
    try:
        yield
    finally:
        base.__class__ = native


def runs(model):
    """How often the native decoder ran so far."""
    plan = vars(model.base_model)["_pliant_native"][0]
    return 0 if plan is None else plan.decoder.runs


@torch.no_grad()
def uncached(model, between=lambda: None, **given):
    between()
    return model(PROMPT, use_cache=False, **given).logits


@torch.no_grad()
def cached(model, between=lambda: None, **given):
    """Logits of a prompt and then of single tokens; ``between`` comes after the prompt."""
    cache = cache_argument(model, transformers.DynamicCache(config=model.config))
    found = [model(PROMPT[:, :6], use_cache=True, **cache).logits]
    between()
    found += [model(PROMPT[:, i : i + 1], use_cache=True, **cache, **given).logits for i in range(6, PROMPT.shape[1])]
    return torch.cat(found, 1)


class Adapter(nn.Module):
    """Something low-rank around a layer, as adapters are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def setting(module, name, value):
    return lambda: setattr(module, name, value)


def first(model):
    return model.base_model.layers[0]


def with_global_hook(model):
    removed = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if module is first(model).mlp else None
    )
    model.undo = removed.remove


def patched_class(model):
    kind = type(first(model).mlp)
    before = kind.forward
    kind.forward = lambda self, x: 2 * before(self, x)
    model.undo = lambda: setattr(kind, "forward", before)


def own_attention(model):
    def zeros(_, query, *__, **___):
        return torch.zeros_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("zeros", zeros)
    model.undo = lambda: ALL_ATTENTION_FUNCTIONS._global_mapping.pop("zeros", None)
    model.config._attn_implementation = "zeros"


def reloaded(model):
    model.load_state_dict(packed(seed=1).state_dict())


def sparse_in_place(model):
    """The same bytes in the same tensor would be of another form."""
    layer = first(model).self_attn.q_proj
    layer._buffers["weight"] = Packed.of(nn.Linear(layer.in_features, layer.out_features, bias=False), "int8").packed


MUTATIONS = {
    "a hook on a layer": lambda m: first(m).register_forward_hook(lambda _, __, out: out + 1.0),
    "a hook on an MLP": lambda m: first(m).mlp.register_forward_hook(lambda _, __, out: out * 2),
    "a hook on a packed layer": lambda m: first(m).mlp.up_proj.register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
    "a hook on the last norm": lambda m: m.base_model.norm.register_forward_hook(lambda _, __, out: out * 2),
    "a hook on every module": with_global_hook,
    "an adapter": lambda m: setattr(first(m).mlp, "down_proj", Adapter(first(m).mlp.down_proj)),
    "an adapter on attention": lambda m: setattr(first(m).self_attn, "v_proj", Adapter(first(m).self_attn.v_proj)),
    "an MLP replaced": lambda m: setattr(first(m), "mlp", nn.Identity()),
    "an activation replaced": lambda m: setattr(first(m).mlp, "act_fn", Twice()),
    "another packed layer": lambda m: setattr(
        first(m).mlp, "down_proj", Packed.of(nn.Linear(48, 36, bias=False), "int8")
    ),
    "a dense layer": lambda m: setattr(first(m).mlp, "down_proj", nn.Linear(48, 36, bias=False)),
    "layers in another order": lambda m: m.base_model.layers.__setitem__(0, m.base_model.layers[1]),
    "fewer layers": lambda m: setattr(m.base_model, "layers", m.base_model.layers[:2]),
    "fewer layers by config": lambda m: setattr(m.config, "num_hidden_layers", 2),
    "a state that is loaded": reloaded,
    "bytes replaced": sparse_in_place,
    "bytes changed in place": lambda m: first(m).mlp.down_proj.packed.copy_(
        packed(seed=1).model.layers[0].mlp.down_proj.packed
    ),
    "a norm changed in place": lambda m: first(m).input_layernorm.weight.data.mul_(3),
    "a norm replaced": lambda m: setattr(first(m).input_layernorm, "weight", nn.Parameter(torch.randn(36))),
    "a norm with a parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        first(m).input_layernorm, "weight", Twice()
    ),
    "an epsilon": lambda m: setattr(first(m).input_layernorm, "variance_epsilon", 1.0),
    "a scale": lambda m: setattr(first(m).self_attn, "scaling", 2.0),
    "a forward of its own": lambda m: setattr(
        first(m).mlp, "forward", types.MethodType(lambda self, x: 2 * self.down_proj(self.up_proj(x)), first(m).mlp)
    ),
    "a class that was patched": patched_class,
    "attention of one's own": own_attention,
    "embeddings replaced": lambda m: m.set_input_embeddings(nn.Embedding(300, 36)),
}


@pytest.mark.parametrize("through", [uncached, cached])
@pytest.mark.parametrize("kind", MUTATIONS)
def test_whatever_is_done_to_a_model_counts(kind, through):
    model = packed()
    before = through(model).float()
    model.undo = lambda: None
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    try:
        torch.manual_seed(0)
        found = through(model, lambda: MUTATIONS[kind](model))
        model.undo()
        torch.manual_seed(0)
        with by_transformers(twin):
            expected = through(twin, lambda: MUTATIONS[kind](twin))
    finally:
        model.undo()
        twin.undo()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before[:, -1], expected[:, -1], rtol=0.01, atol=0.01), "the mutation does nothing"


@pytest.mark.parametrize("through", [uncached, cached])
def test_a_model_that_is_made_bfloat16_afterwards(through):
    model = packed().bfloat16()
    before = plan_of(model.base_model).decoder.runs
    found = through(model)
    assert (found.dtype, runs(model) > before) == (torch.bfloat16, True)
    with by_transformers(model):
        expected = through(model)
    assert (found - expected).float().norm() < 0.05 * expected.float().norm()


ARGUMENTS = {
    "several sequences in a row": {"position_ids": torch.arange(6).repeat(2)[None]},
    "padding on the left": {"attention_mask": (torch.arange(12) >= 3).long()[None]},
    "a mask of its own": {"attention_mask": torch.ones(1, 1, 12, 12).tril(-2) + torch.eye(12) > 0},
    "tokens that see those behind them": {"is_causal": False},
    "sequences by their ends": {
        "cu_seq_lens_q": torch.tensor([0, 6, 12], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 6, 12], dtype=torch.int32),
        "max_length_q": 6,
        "max_length_k": 6,
    },
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_an_argument_that_it_does_not_know_is_left_to_transformers(kind):
    model = packed()
    uncached(model)
    before = runs(model)
    found = uncached(model, **ARGUMENTS[kind])
    assert runs(model) == before, "it ran natively"
    with by_transformers(model):
        assert torch.equal(found, uncached(model, **ARGUMENTS[kind]))


def test_arguments_that_say_nothing_do_not_stop_it():
    model = packed()
    before = runs(model)
    places = torch.arange(12)[None]
    found = uncached(
        model, attention_mask=torch.ones_like(PROMPT), position_ids=places, output_attentions=False, foo=None
    )
    assert runs(model) == before + 1
    with by_transformers(model):
        torch.testing.assert_close(found, uncached(model), rtol=1e-3, atol=1e-4)


def test_it_is_native_again_when_a_hook_is_gone():
    model = packed()
    handle = first(model).register_forward_hook(lambda _, __, out: out)
    assert plan_of(model.base_model) is None
    uncached(model)
    handle.remove()
    before = plan_of(model.base_model).decoder.runs
    uncached(model)
    assert runs(model) == before + 1


def test_gradients_counters_and_transforms_are_left_to_transformers():
    class Records(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    model = packed()
    before = runs(model)
    with Records(), torch.no_grad():
        model(PROMPT, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(PROMPT, use_cache=False)
    model(PROMPT, use_cache=False)
    model.train()
    uncached(model)
    model.eval()
    first(model).mlp.train()
    uncached(model)
    assert runs(model) == before
    assert len(seen) > 100


def test_other_weights_for_one_call():
    model, other = packed(), packed(seed=1)
    with torch.no_grad():
        found = torch.func.functional_call(model, other.state_dict(), (PROMPT,), {"use_cache": False}).logits
    torch.testing.assert_close(found, uncached(other), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(uncached(model), uncached(packed()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_run_natively(dtype, tmp_path):
    pico().to(dtype).save_pretrained(tmp_path)
    model = pliant.load(tmp_path)
    pliant.apply(model, pliant.PackedLinear(format="int8"), progress=False)
    assert model.pliant_history[-1]["native"], model.pliant_history[-1]["why_not_native"]
    before = runs(model)
    found = uncached(model)
    assert (found.dtype, runs(model)) == (dtype, before + 1)
    with by_transformers(model):
        expected = uncached(model)
    assert (found - expected).float().norm() < 0.05 * expected.float().norm()


def test_a_kind_of_attention_that_is_not_known_is_not_run_natively():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    model = pico("mistral", rope_parameters={**rope, "llama_4_scaling_beta": 0.1})
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    assert "'llama_4_scaling_beta'" in model.pliant_history[-1]["why_not_native"]
    packed("mistral", rope_parameters=rope)
    model = pico("llama")
    model.config.is_causal = False
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    assert "its attention is not causal" in model.pliant_history[-1]["why_not_native"]


@pytest.mark.parametrize("where", ["at position 0", "at position 240"])
def test_a_model_that_computes_something_else_is_found_out(where, monkeypatch):
    model = pico()
    rotary = type(model.model.rotary_emb)
    angles = rotary.forward

    def other(self, x, position_ids):
        seen = angles(self, x, position_ids)
        shifted = position_ids[0, 0] > 0 if where == "at position 240" else position_ids[0, 0] == 0
        natively = isinstance(model.base_model, Native)
        return tuple(table * (0.5 if shifted and natively else 1) for table in seen)

    monkeypatch.setattr(rotary, "forward", other)
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    assert f"% {where}" in model.pliant_history[-1]["why_not_native"]
    assert not isinstance(model.base_model, Native)


def test_it_has_to_generate_with_a_cache(monkeypatch):
    """If a later transformers called it with arguments that it does not know, it would say so."""
    model = pico()
    own = type(model).prepare_inputs_for_generation

    @functools.wraps(own)
    def prepare(*args, **kwargs):
        return {**own(*args, **kwargs), "news": 1}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    assert "arguments that native runs do not support" in model.pliant_history[-1]["why_not_native"]


def test_run_natively_says_why_it_no_longer_does():
    model = packed()
    assert run_natively(model) == ""
    first(model).mlp = nn.Identity()
    assert "no longer those" in run_natively(model)


class Remembers(transformers.StoppingCriteria):
    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores, **_):  # noqa: ARG002
        self.lengths.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20)


class Collects(transformers.TextStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.seen.append("end")


GENERATE = {
    "greedy": {},
    "a criterion": {"stopping_criteria": [lambda ids, _: ids.sum(1) < 0]},
    "beams": {"num_beams": 3},
    "beams that are sampled": {"num_beams": 2, "do_sample": True},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "a processor": {"logits_processor": [lambda _, scores: scores.roll(1, -1)]},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda _, __: list(range(3, 200))},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 2},
    "a static cache": {"cache_implementation": "static"},
    "a quantised prompt in pieces": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", GENERATE)
def test_generate_is_that_of_transformers(kind, threads):
    model = packed()
    before = torch.get_num_threads()
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **GENERATE[kind]}
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        found = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **given)
        torch.manual_seed(0)
        with by_transformers(model):
            expected = type(model).generate(model, PROMPT, attention_mask=torch.ones_like(PROMPT), **given)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


def test_generate_of_several_prompts_with_padding():
    model = packed()
    ids = torch.cat([IDS, IDS.flip(0)])
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(ids, **given)
    with by_transformers(model):
        assert torch.equal(found, type(model).generate(model, ids, **given))
    alone = model.generate(ids[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(found[:1], alone)


def test_generate_from_embeddings_and_with_a_streamer():
    model = packed()
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(PROMPT, **given)[0, 12:].tolist()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(PROMPT)
    assert model.generate(inputs_embeds=embeds, **given)[0].tolist() == expected
    streamer = Collects()
    model.generate(PROMPT, streamer=streamer, **given)
    assert streamer.seen == [*PROMPT[0].tolist(), *expected, "end"]


@pytest.mark.usefixtures("two_threads")
def test_criteria_keep_what_they_remember_and_have_all_threads():
    model = packed()
    criterion, seen = Remembers(), set()
    note = lambda _, scores: seen.add(torch.get_num_threads()) or scores  # noqa: E731
    before = runs(model)
    found = model.generate(
        PROMPT,
        max_new_tokens=30,
        do_sample=False,
        stopping_criteria=[criterion],
        logits_processor=[note],
        eos_token_id=299,
    )
    assert found.shape[1] <= 20
    assert criterion.lengths == list(range(13, found.shape[1] + 1))
    assert runs(model) == before + len(criterion.lengths)
    assert seen == {2}


def patched(owner, name, own):
    """The method ``name``, with ``own`` called before it."""
    stock = getattr(owner, name)

    def called(*args, **kwargs):
        own()
        return stock(*args, **kwargs)

    return called


class Replaces:
    """A criterion, processor, streamer or hook that exchanges a layer of the model on its third call."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def now(self):
        self.calls += 1
        if self.calls == 3:
            first(self.model).mlp = nn.Identity()

    def __call__(self, _, scores):
        self.now()
        return scores

    def stops(self, ids, _, **__):
        self.now()
        return torch.zeros(len(ids), dtype=torch.bool)

    def put(self, _):
        self.now()

    def end(self):
        pass

    def hook(self, *_):
        self.now()


CALLED = {
    "a processor": lambda does: {"logits_processor": [does]},
    "a criterion": lambda does: {"stopping_criteria": [does.stops]},
    "a streamer": lambda does: {"streamer": does},
    "allowed tokens": lambda does: {"prefix_allowed_tokens_fn": lambda *_: does.now() or list(range(3, 200))},
    "a hook of the head": lambda does: does.model.lm_head.register_forward_hook(does.hook) and {},
    **{
        f"{name} of the model": lambda does, name=name: (
            setattr(does.model, name, patched(does.model, name, does.now)) or {}
        )
        for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    },
    **{
        f"the forward of {name}": lambda does, name=name: (
            setattr(
                does.model.get_submodule(name), "forward", patched(does.model.get_submodule(name), "forward", does.now)
            )
            or {}
        )
        for name in ("model.embed_tokens", "lm_head")
    },
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", CALLED)
def test_a_model_changed_while_it_generates(kind):
    found = []
    for own in (False, True):
        model = packed(format="int8")
        given = {**CALLED[kind](Replaces(model)), "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        with by_transformers(model) if own else contextlib.nullcontext():
            found.append(model.generate(PROMPT, **given))
        assert isinstance(first(model).mlp, nn.Identity)
    assert torch.equal(*found)


@pytest.mark.usefixtures("two_threads")
def test_a_patched_class_is_not_trusted(monkeypatch):
    found = []
    stock = transformers.LlamaForCausalLM.forward
    for own in (False, True):
        model = packed(format="int8")
        does = Replaces(model)

        @functools.wraps(stock)
        def forward(self, *args, does=does, **kwargs):
            does.now()
            return stock(self, *args, **kwargs)

        forward.__module__ = __name__
        monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
        with by_transformers(model) if own else contextlib.nullcontext():
            found.append(model.generate(PROMPT, max_new_tokens=9, min_new_tokens=9, do_sample=False))
    assert torch.equal(*found)


class Slotted:
    __slots__ = ("limit",)

    def __call__(self, ids, _, **__):
        return torch.full((len(ids),), ids.shape[1] >= self.limit)


class Named(transformers.LogitsProcessorList):
    def __init__(self, name, processors):
        super().__init__(processors)
        self.name = name


@pytest.mark.usefixtures("two_threads")
def test_criteria_and_processors_of_any_kind():
    model = packed()
    criterion = Slotted()
    criterion.limit = 16
    found = model.generate(PROMPT, max_new_tokens=30, do_sample=False, stopping_criteria=[criterion], eos_token_id=299)
    assert found.shape[1] <= 16
    processors = Named("roll", [lambda _, scores: scores.roll(1, -1)])
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(PROMPT, logits_processor=processors, **given)
    with by_transformers(model):
        assert torch.equal(found, type(model).generate(model, PROMPT, logits_processor=processors, **given))


def test_a_padding_row_of_zeros_does_not_stop_it():
    packed(pad_token_id=0)


def test_a_base_without_an_argument_for_the_cache_stays_as_it_is():
    class Plain(transformers.LlamaModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = pico("llama")
    model.model.__class__ = Plain
    pliant.apply(model, pliant.PackedLinear(format="bf16"), progress=False)
    assert "names no argument for a cache" in model.pliant_history[-1]["why_not_native"]
    assert torch.isfinite(uncached(model)).all()


def test_torchs_attention_may_be_replaced(monkeypatch):
    model = packed()
    before = runs(model)
    stock = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: 2 * stock(*a, **k))
    found = uncached(model)
    assert runs(model) in (0, before)
    with by_transformers(model):
        assert torch.equal(found, uncached(model))


def test_layers_that_share_a_cache_entry_do_not_run_natively():
    model = packed()
    model.model.layers[1].self_attn.layer_idx = 0
    assert plan_of(model.base_model) is None


def test_the_config_is_watched():
    for key, value in (("is_causal", False), ("rope_parameters", {"rope_type": "default", "strange": 1})):
        model = packed()
        setattr(model.config, key, value)
        assert plan_of(model.base_model) is None, key
    model = packed()
    model.config.rope_parameters["strange"] = 3
    assert plan_of(model.base_model) is None


@torch.no_grad()
def test_keys_and_values_refuse_to_be_changed_in_place():
    model = packed()
    cache = transformers.DynamicCache(config=model.config)
    model(PROMPT, use_cache=True, **cache_argument(model, cache))
    keys = cache.layers[0].keys
    for change in (lambda: keys[:, :, 0].zero_(), lambda: keys.__setitem__(0, 0.0), lambda: keys.view(-1).add_(1)):
        with pytest.raises(PackedError, match="cannot be changed in place"):
            change()
    assert type(keys + 1) is type(keys.clone()) is torch.Tensor
    (keys.clone()).zero_()


@pytest.mark.usefixtures("two_threads")
def test_a_model_is_checked_once_while_only_transformers_runs(monkeypatch):
    model = packed()
    checks, check = [], Watch.unchanged
    monkeypatch.setattr(Watch, "unchanged", lambda watch: checks.append(watch) or check(watch))
    before = runs(model)
    model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert (len(checks), runs(model)) == (1, before + 8)
    with torch.no_grad():
        model(PROMPT)
    assert len(checks) == 2


def test_several_threads_generate_at_once():
    from concurrent.futures import ThreadPoolExecutor

    model = packed(format="int8")
    prompts = [torch.randint(3, 300, (1, 10 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    settings = GenerationConfig(max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=2)

    def answer(prompt):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=copy.copy(settings))

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(alone, pool.map(answer, prompts), strict=True):
            assert torch.equal(a, b)


def test_the_cache_goes_by_either_name():
    model = packed()
    for name in ("cache", "past_key_values"):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model.base_model(PROMPT, **{name: cache})
        assert cache.get_seq_length() == 12
        again = copy.deepcopy(cache)
        found = model.generate(torch.cat([PROMPT, IDS[:1, :3]], 1), max_new_tokens=4, do_sample=False, **{name: cache})
        whole = model.generate(torch.cat([PROMPT, IDS[:1, :3]], 1), max_new_tokens=4, do_sample=False)
        assert torch.equal(found, whole)
        assert again.get_seq_length() == 12


def test_a_cache_of_another_model_is_refused():
    model = packed()
    cache = pliant.BlockCache(model.config)
    cache.layers[0].append(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4))
    with torch.no_grad(), pytest.raises(PackedError, match="3 heads of width 4"):
        model(PROMPT, **cache_argument(model, cache))


@torch.no_grad()
def differs(model, change):
    """How far a native run is from transformers' code after a change, and how far that is from before."""
    before = uncached(model)
    change(model)
    found = uncached(model)
    with by_transformers(model):
        expected = uncached(model)
    return float((found - expected).abs().max()), float((expected - before).abs().max())


def other_data(model):
    model.model.norm.weight.data = torch.zeros_like(model.model.norm.weight)


def other_vector(model):
    torch.manual_seed(0)
    torch.nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())), model.parameters())


def other_bytes(model):
    layer = first(model).mlp.down_proj
    layer.packed.data = packed(seed=1).model.layers[0].mlp.down_proj.packed.clone()


def all_norms(model):
    for layer in model.model.layers:
        layer.input_layernorm = nn.LayerNorm(36, bias=False).eval()
        layer.post_attention_layernorm = nn.LayerNorm(36, bias=False).eval()
    model.model.norm = nn.LayerNorm(36, bias=False).eval()


def all_activations(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU().eval()


@pytest.mark.parametrize("change", [other_data, other_vector, other_bytes, all_norms, all_activations])
def test_data_that_is_exchanged_and_parts_that_are_alike_count(change):
    off, effect = differs(packed(), change)
    assert off < 1e-4
    assert effect > 0.01


def test_a_config_that_transformers_no_longer_reads_is_not_obeyed():
    off, effect = differs(packed(), lambda model: setattr(model.config, "hidden_act", "gelu"))
    assert (off, effect) < (1e-4, 1e-9)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm3", "mistral"])
@pytest.mark.parametrize("change", ["sliding_window", "layer_types"])
def test_windows_are_those_of_the_masks(name, change):
    kinds = ["sliding_attention", "full_attention"] * 2
    own = {"use_sliding_window": True, "max_window_layers": 4, "layer_types": kinds} if name != "mistral" else {}
    model = packed(name, sliding_window=4, **own)
    if change == "layer_types" and name == "mistral":
        pytest.skip("it has none")

    def changed(model):
        if change == "sliding_window":
            model.config.sliding_window = 2
        else:
            model.config.layer_types[0] = "full_attention"

    off, _ = differs(model, changed)
    assert off < 1e-4


def test_code_that_is_patched_around_modules_counts(monkeypatch):
    import transformers.models.llama.modeling_llama as modeling

    model = packed()
    monkeypatch.setattr(modeling.LlamaMLP, "__call__", lambda _, x: x * 0)
    assert differs(model, lambda _: None)[0] == 0
    monkeypatch.undo()
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
    assert differs(model, lambda _: None)[0] == 0


def test_masks_by_kind_of_layer_are_left_to_transformers():
    model = packed("qwen2")
    found = uncached(model, attention_mask={"full_attention": None})
    with by_transformers(model):
        assert torch.equal(found, uncached(model, attention_mask={"full_attention": None}))


def test_keys_and_values_of_a_native_run_can_be_read():
    dense, model = pico(initializer_range=0.3), packed(initializer_range=0.3)
    for which in (dense, model):
        with torch.no_grad():
            cache = which(PROMPT, use_cache=True)
            cache = getattr(cache, "cache", None) or cache.past_key_values
            again = transformers.DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
            assert again.get_seq_length() == 12
            found = which(PROMPT[:, :1], **cache_argument(which, again)).logits
            whole = which(torch.cat([PROMPT, PROMPT[:, :1]], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)
    with pytest.raises(PackedError, match="cannot be replaced"):
        pliant.BlockCache(model.config).layers[0].keys = torch.zeros(1)
