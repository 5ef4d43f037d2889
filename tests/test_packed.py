"""Packed layers in models: the step, the op, the folder."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers

import pliant
from pico import DECODERS, IDS, inputs, logits, pico
from pliant.checkpoint.packed_bytes import is_packed
from pliant.compat.cache_argument import cache_argument
from pliant.compat.packed_layers import settle
from pliant.errors import ArtefactError, DataError, PackedError, StepError
from pliant.runtime import library
from pliant.runtime import sparse_break_even as measured
from pliant.runtime.packed_linear import Packed, linear
from pliant.runtime.packed_matrix import header, pack
from pliant.values.magnitude import zero_smallest
from pliant.values.matrix import select_matrices

needs_kernels = pytest.mark.skipif(library.library() is None, reason=library.state())


def packed(name="llama", steps=(), **settings):
    model = pico(name)
    return pliant.apply(model, [*steps, pliant.PackedLinear(**settings)], progress=False)


def rounded(name, **settings):
    """The dense model with the weights that the packed one stands for."""
    model, dense = packed(name, **settings), pico(name)
    for path, layer in model.named_modules():
        if isinstance(layer, Packed):
            there = dense.get_submodule(path)
            weight = layer.dense().weight.detach()
            there.weight = torch.nn.Parameter(weight if isinstance(there, torch.nn.Linear) else weight.T.contiguous())
    return model, dense.eval()


@pytest.mark.parametrize("name", DECODERS)
def test_a_packed_model_is_its_rounded_self(name):
    """bf16 rounds no activations, so the logits are those of the dense model with rounded weights."""
    model, dense = rounded(name, format="bf16", head="bf16")
    assert is_packed(model)
    torch.testing.assert_close(logits(model), logits(dense), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_it_reloads_with_plain_transformers(tmp_path, name):
    model = packed(name, format="int4", sparse="always", steps=[pliant.Magnitude(sparsity=0.5)])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(pliant.load(tmp_path)), expected)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "pliant"
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(pliant.load(tmp_path / "twice")), expected)


CLASSES = ["AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"]


@pytest.mark.parametrize("opened", CLASSES)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_folder_opens_in_a_class_with_another_head_or_none(tmp_path, name, whole, opened):
    """The layers of a base have another prefix where a head is on top."""
    model = pico(name)
    written = model if whole else model.base_model
    pliant.apply(written, [pliant.PackedLinear(format="int8", head="int8" if whole else "dense")], progress=False)
    written.save_pretrained(tmp_path / "once")
    given = inputs(model)
    with torch.no_grad():
        expected = model.base_model(**given).last_hidden_state
        for _ in range(2):
            again = getattr(transformers, opened).from_pretrained(tmp_path / "once")
            found = {path for path, module in again.base_model.named_modules() if isinstance(module, Packed)}
            there = {path for path, module in model.base_model.named_modules() if isinstance(module, Packed)}
            assert there - found <= {"pooler.dense"}
            assert again.config.quantization_config.modules.keys() == {
                path for path, module in again.named_modules() if isinstance(module, Packed)
            }
            torch.testing.assert_close(again.base_model(**given).last_hidden_state, expected, rtol=0, atol=0)
            again.save_pretrained(tmp_path / "once")


def test_a_folder_of_a_packed_head_alone_opens_without_it(tmp_path):
    model = packed(format="int8", head="int8", target_modules=["lm_head"])
    model.save_pretrained(tmp_path)
    expected = model.base_model(IDS).last_hidden_state
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert not is_packed(again)
    assert torch.equal(again(IDS).last_hidden_state, expected)


def test_names_that_fit_no_layer_are_refused(tmp_path):
    packed(format="int8").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    config["quantization_config"]["modules"] = {f"decoder.{name}": entry for name, entry in modules.items()}
    file.write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=r"LlamaForCausalLM has none of the packed layers .* 'decoder.model.layers"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_packed_bytes_in_a_layer_that_is_not_packed_are_refused():
    model = pico("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(pack(layer.weight, "int8"), requires_grad=False)
    with pytest.raises(ArtefactError, match=r"model.layers.0.mlp.up_proj: packed bytes were loaded into a layer"):
        settle(model)


def test_a_cut_model_is_packed_and_reloads(tmp_path):
    model = pico("llama")
    cut = pliant.Cut(subnet=pliant.Subnet().keeping("layers.1.mlp.channels", 17).without("layers.2.attention"))
    pliant.apply(model, [cut, pliant.PackedLinear(format="int8")], progress=False)
    expected = logits(model)
    pliant.save(model, tmp_path / "small")
    assert torch.equal(logits(pliant.load(tmp_path / "small")), expected)
    history = model.pliant_history
    assert history[1]["parameters_after"] == history[1]["parameters_before"] == history[0]["parameters_after"]


def test_transformers_alone_refuses_it(tmp_path):
    packed(format="int8").save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['pliant'] = None\nimport transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode
    assert "Error" in outcome.stderr


def test_a_damaged_folder_is_refused(tmp_path):
    packed(format="int8").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = data.find(b"PLIANTW\n")
    data[begin + 300] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match="checksum"):
        pliant.load(tmp_path)
    file.write_bytes(bytes(data[:-100]))
    with pytest.raises(ArtefactError, match="truncated"):
        pliant.load(tmp_path)


def test_auto_keeps_weights_as_they_are():
    plain = packed()
    forms = {layer.header().format for layer in plain.modules() if isinstance(layer, Packed)}
    assert forms == {"bf16", "int8"}  # the head
    for bits, group, form in ((4, 128, "int4"), (4, 32, "int4"), (8, None, "int8")):
        model, dense = pico("llama"), pico("llama")
        pliant.apply(dense, pliant.RTN(bits=bits, group=group), progress=False)
        pliant.apply(model, [pliant.RTN(bits=bits, group=group), pliant.PackedLinear()], progress=False)
        for matrix in select_matrices(dense).matrices:
            layer = model.get_submodule(matrix.name)
            assert layer.header().format == form
            assert torch.equal(layer.dense().weight, matrix.weight)


def test_rules_choose_by_name():
    model = packed(format="int4", head="dense", rules={r"layers\.0\.": "dense", "down_proj": "int8"})
    form = {name: layer.header().format for name, layer in model.named_modules() if isinstance(layer, Packed)}
    assert not any("layers.0." in name for name in form)
    assert form["model.layers.1.mlp.down_proj"] == "int8"
    assert form["model.layers.1.mlp.up_proj"] == "int4"
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert pliant.PackedLinear(rules="down_proj=int8, q=dense").rules == {"down_proj": "int8", "q": "dense"}


def test_settings_that_make_no_sense_are_refused():
    for settings, said in (
        ({"format": "int3"}, "format must be one of"),
        ({"head": "int3"}, "head must be one of"),
        ({"rules": {"(": "int8"}}, "not a valid regular expression"),
        ({"rules": "int8"}, "pattern=format"),
        ({"group": 16}, "group must be one of"),
        ({"group": 32.0}, r"group must be one of .*; not 32\.0"),
        ({"rules": None}, "rules must map regular expressions to formats, .* not None"),
        ({"rules": {3: "int8"}}, "rules must map regular expressions to formats"),
        ({"rules": ["down_proj"]}, "rules must map regular expressions to formats"),
        ({"format": None}, "format must be one of"),
        ({"key_sparsity": "0.3"}, "key_sparsity must be a number of at least 0 and below 1; not '0.3'"),
        ({"value_sparsity": None}, "value_sparsity must be a number"),
        ({"cache": None}, "cache must be one of bf16, int8, float32; not None"),
        ({"sparse": "yes"}, "sparse must be one of auto, always, never; not 'yes'"),
    ):
        with pytest.raises(StepError, match=said):
            pliant.PackedLinear(**settings)
    with pytest.raises(StepError, match="no linear layer's name"):
        packed(rules={"nothing_like_it": "int8"})
    with pytest.raises(StepError, match="packing comes last"):
        pliant.apply(packed(), pliant.Magnitude(sparsity=0.1), progress=False)
    with pytest.raises(StepError, match="none of the layers"):
        packed(format="dense", head="dense")


class Untouched(torch.nn.Linear):
    """Fails as soon as anything reads its parameters."""

    def parameters(self, *_, **__):
        raise AssertionError("the model was read")


@pytest.mark.parametrize("last", [pliant.PackedLinear(), pliant.SparAMX(sparsity=0.5)], ids=lambda step: step.kind)
def test_a_step_after_packing_is_refused_before_any_work(last):
    steps = [last, pliant.Magnitude(sparsity=0.1)]
    with pytest.raises(
        StepError, match=f"{last.kind} packs the model, and packing comes last; magnitude comes after it"
    ):
        pliant.apply(Untouched(2, 2), steps, progress=False)
    with pytest.raises(StepError, match="packing comes last"):
        pliant.apply(Untouched(2, 2), [last, last], progress=False)


@pytest.mark.parametrize(
    ("model", "step", "data", "error", "said"),
    [
        ("folder", pliant.Magnitude(sparsity=0.1), None, StepError, r"load it first: pliant\.load\('folder'\)"),
        (None, pliant.Magnitude(sparsity=0.1), None, StepError, "model must be a torch.nn.Module; not None"),
        (torch.nn.Linear(2, 2), None, None, StepError, "a step is expected, .* not None"),
        (torch.nn.Linear(2, 2), "packed", None, StepError, "a step is expected, .* not 'packed'"),
        (torch.nn.Linear(2, 2), [pliant.PackedLinear], None, StepError, "a step is expected"),
        (torch.nn.Linear(2, 2), pliant.Magnitude(sparsity=0.1), 5, DataError, "data must be .* not 5"),
    ],
)
def test_what_is_no_model_step_or_data_is_refused(model, step, data, error, said):
    with pytest.raises(error, match=said):
        pliant.apply(model, step, data, progress=False)


@pytest.mark.parametrize("within", ["matrix", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_the_smallest_weights_go(sparsity, within):
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    pruned = weight.clone()
    zero_smallest(pruned, sparsity, within=within)
    gone = pruned == 0
    assert int(gone.sum()) == round(sparsity * (400 if within == "matrix" else 50)) * (1 if within == "matrix" else 8)
    for part, left in zip(weight if within == "row" else [weight], gone if within == "row" else [gone], strict=True):
        if left.any() and not left.all():
            assert part[left].abs().max() <= part[~left].abs().min()
    assert torch.equal(pruned[~gone], weight[~gone])
    level = torch.ones(4, 4)
    zero_smallest(level, 0.5)
    assert int((level == 0).sum()) == 8


def test_steps_on_values_reach_every_matrix():
    model = pliant.apply(pico("mixtral"), pliant.Magnitude(sparsity=0.5), progress=False)
    for matrix in select_matrices(model).matrices:
        assert float((matrix.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert model.pliant_history[0]["sparsity"] == pytest.approx(0.5, abs=0.01)
    before = copy.deepcopy(model)
    pliant.apply(model, pliant.RTN(bits=3, group=32), progress=False)
    for matrix, old in zip(select_matrices(model).matrices, select_matrices(before).matrices, strict=True):
        assert torch.equal(matrix.weight[old.weight == 0], old.weight[old.weight == 0])
        assert len(matrix.weight.flatten(0, -2)[0][:32].unique()) <= 8
    assert 0 < model.pliant_history[1]["relative_error"] < 0.5
    for step, said in (
        (lambda: pliant.Magnitude(sparsity=1.5), "from 0 to 1"),
        (lambda: pliant.Magnitude(sparsity=0.5, within="model"), "within must be one of matrix, row; not 'model'"),
        (lambda: pliant.RTN(bits=9), "from 2 to 8"),
        (lambda: pliant.RTN(group=0), "group must be a whole number of at least 1, or none; not 0"),
    ):
        with pytest.raises(StepError, match=said):
            step()


def test_sparamx_packs_what_is_sparse(tmp_path):
    model = pliant.apply(pico("llama"), pliant.SparAMX(sparsity=0.5, sparse="always"), progress=False)
    layers = {name: layer.header() for name, layer in model.named_modules() if isinstance(layer, Packed)}
    assert all(found.sparse and found.format == "bf16" for found in layers.values())
    assert isinstance(model.lm_head, torch.nn.Linear)
    model.save_pretrained(tmp_path)
    again = pliant.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    cache = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["cache"]
    assert cache == {"format": "bf16", "key_sparsity": 0.3, "value_sparsity": 0.5}
    if library.library() is not None:
        kept = transformers.DynamicCache(config=again.config)
        with torch.inference_mode():
            again(torch.arange(3, 203)[None], **cache_argument(again, kept))
        keys, values = kept.layers[0].read()
        assert float((keys[:, :, 64:128] == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
        assert float((values[:, :, 64:128] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(StepError, match="format must be one of bf16, int8; not 'int4'"):
        pliant.SparAMX(format="int4")
    with pytest.raises(StepError, match=r"key_sparsity must be a number of at least 0 and below 1; not 1\.0"):
        pliant.SparAMX(key_sparsity=1.0)


def test_it_compiles_as_one_graph():
    layer = Packed.of(torch.nn.Linear(64, 40), "int8")
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.library.opcheck(
        torch.ops.pliant.linear.default,
        (x, layer.packed, layer.bias, 40),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_gradients_pass_through_to_x():
    layer = Packed.of(torch.nn.Linear(64, 40), "bf16")
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().weight.sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)


def test_any_dtype_and_layout_of_x():
    dense = torch.nn.Linear(64, 40)
    layer = Packed.of(dense, "bf16")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = layer(x)
        assert expected.shape == (2, 5, 40)
        assert torch.equal(layer(x[:, ::2]), expected[:, ::2])
        assert torch.equal(layer(x.transpose(0, 1)), expected.transpose(0, 1))
        assert torch.equal(layer(x[0, 0]), expected[0, 0])
        assert layer(x[:0]).shape == (0, 5, 40)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert layer(x.to(dtype)).dtype == dtype
            torch.testing.assert_close(layer(x.to(dtype)).float(), expected, rtol=0.02, atol=0.02)
        layer.to(torch.bfloat16)  # casts the bias
        torch.testing.assert_close(layer(x), expected, rtol=0.01, atol=0.01)


def test_state_is_loaded_with_another_sparsity():
    layer, other = Packed.of(torch.nn.Linear(64, 40), "int8"), Packed.of(torch.nn.Linear(64, 40), "int4", sparse=True)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(1, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))
    with pytest.raises(PackedError, match="30 x 64 was loaded into a layer of 40 x 64"):
        layer.load_state_dict(Packed.of(torch.nn.Linear(64, 30), "int8").state_dict() | {"bias": torch.zeros(40)})
    with pytest.raises(PackedError, match="cannot be packed; give a"):
        Packed.of(torch.nn.Conv1d(1, 1, 1), "int8")
    assert "int4 of 128 sparse" in repr(other)


@pytest.mark.parametrize(
    ("seconds", "border"),
    [
        ((1.0, 1.4, 1.0, 0.6), 0.7),  # as timed
        ((1.0, 1.2, 0.8, 0.4), 0.6),  # between two timings
        ((1.0, 0.8, 0.6, 0.4), 0.5 / 1.2),  # below the first: nothing left out would take twice as long
        ((1.0, 1.6, 1.4, 1.2), 2.0),  # never
        ((1.0, 1.1, 1.2, 0.9), 0.9 - 0.2 / 3),
    ],
)
def test_zeros_are_left_out_from_where_that_is_as_fast(monkeypatch, seconds, border):
    timed = []
    monkeypatch.setattr(measured, "_times", lambda forms: timed.append(forms) or list(seconds))
    monkeypatch.setattr(measured, "library", lambda: True)
    measured._measured.cache_clear()
    try:
        assert measured.break_even("int8") == pytest.approx(border)
        dense, *sparse = [header(form) for form in timed[0]]
        assert not dense.sparse
        assert all(form.sparse for form in sparse)
        assert [1 - form.stored / (form.rows * form.columns) for form in sparse] == pytest.approx(
            [0.5, 0.7, 0.9], abs=0.01
        )
        for zeros in (0.3, 0.55, 0.65, 0.95):
            module = torch.nn.Sequential(torch.nn.Linear(64, 64))
            steps = [pliant.Magnitude(sparsity=zeros), pliant.PackedLinear(format="int8")]
            pliant.apply(module, steps, progress=False)
            assert module[0].header().sparse == (zeros > border)
        assert len(timed) == 1
    finally:
        measured._measured.cache_clear()


@needs_kernels
def test_every_form_is_timed():
    forms = [pack(torch.randn(measured.SIZE), format) for format in ("bf16", "int8")]
    found = measured._times(forms)
    assert len(found) == 2
    assert all(0 < seconds < 1 for seconds in found)


def test_a_copy_is_a_model_of_its_own():
    model = packed(format="int8")
    expected = logits(model)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), expected)
    with torch.no_grad():
        again.model.norm.weight.mul_(0.5)
    assert not torch.allclose(logits(again), expected, atol=1e-3)
    assert torch.equal(logits(model), expected)


def test_the_layer_is_the_function():
    layer = Packed.of(torch.nn.Linear(64, 40), "int8", sparse=True)
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x, layer.packed, layer.bias, 40))


def test_generation_goes_on_as_it_began():
    model = packed(format="int8")
    with torch.inference_mode():
        found = model.generate(IDS[:1], max_new_tokens=12, do_sample=False)
        for length in range(IDS.shape[1], found.shape[1]):
            assert int(model(found[:, :length]).logits[0, -1].argmax()) == int(found[0, length])


@pytest.mark.parametrize("head", ["int8", "dense"])
def test_inspection_tells_what_is_packed_and_what_it_takes(tmp_path, head):
    model = packed(format="int4", head=head, cache="int8")
    model.save_pretrained(tmp_path)
    found = pliant.inspect(tmp_path)
    layers = sum(isinstance(module, Packed) for module in model.modules())
    assert found["packed"] == ({"int4": layers - 1, "int8": 1} if head == "int8" else {"int4": layers})
    assert found["self_check"] == "not run"
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored - 65536 < found["weight_bytes"] < stored
    dense = pliant.inspect(pico("llama"))
    assert dense["packed"] == {}
    assert dense["self_check"] == "passed"
    if library.library() is not None:
        assert found["cache_bytes_per_token"] < dense["cache_bytes_per_token"]
