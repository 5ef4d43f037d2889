"""Steps on values work on any module that has linear layers, and report which layers they skip."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

import pliant
from pico import IDS, inputs, logits, pico
from pliant.checkpoint.packed_bytes import packed_bytes
from pliant.compat.packed_layers import record_packed
from pliant.errors import PackedError, StepError
from pliant.measure.speed.bench import PROMPT
from pliant.record import notes_of
from pliant.run.model_costs import model_costs
from pliant.runtime.packed_linear import Packed


def pack(module, **settings):
    return pliant.apply(module, pliant.PackedLinear(**{"format": "bf16", **settings}), progress=False)


def small(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU()))).eval()


def packed_in(module):
    return {name for name, layer in module.named_modules() if isinstance(layer, Packed)}


def left(module):
    """why -> names."""
    return {kind["why"]: kind["names"] for kind in module.pliant_history[-1]["left"]["reasons"]}


def why(module, name):
    return next((reason for reason, names in left(module).items() if name in names), None)


def close(found, expected, off=0.02):
    """bf16 keeps 8 bits of a weight."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).float().norm() / expected.float().norm()) < off


@torch.inference_mode()
def run(module, *args, **kwargs):
    return module(*args, **kwargs)


class Tied(nn.Module):
    """An embedding, two layers that share a weight, one layer in two places, and a decoder that is tied to the
    embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.up, self.again = nn.Linear(32, 32), nn.Linear(32, 32)
        self.again.weight = self.up.weight
        self.twice = nn.ModuleList([nn.Linear(32, 32)] * 2)
        self.decoder = nn.Linear(32, 50, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        x = self.again(self.up(self.embedding(ids)).relu())
        for layer in self.twice:
            x = layer(x)
        return self.decoder(x)


class Experts(nn.Module):
    """A parameter with three dimensions, and a matrix that is no layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(4, 16, 16) * 0.1)
        self.router = nn.Parameter(torch.randn(4, 16))
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(torch.einsum("bi,eio,eb->bo", x, self.stack, (self.router @ x.T).softmax(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (2, 3, 5, 64)])
def test_a_sequential_of_any_dtype_takes_inputs_of_any_rank(dtype, shape):
    module = small(64, 96, 24).to(dtype)
    x = torch.randn(shape).to(dtype)
    expected = run(module, x)
    pack(module)
    assert packed_in(module) == {"0", "2"}
    close(run(module, x), expected)
    assert module[0].weight.dtype == dtype
    assert left(module) == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("settings", [{"norm_first": True}, {}, {"activation": "gelu"}, {"batch_first": False}])
def test_torch_own_transformer_leaves_its_fused_path_to_dense_layers(settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, **settings})
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not settings).eval()
    x = torch.randn(3, 7, 32)
    padding = torch.arange(7) > torch.tensor([[6], [3], [5]])
    if settings.get("batch_first") is False:
        x = x.transpose(0, 1)
    masks = {"whole": {}, "padded": {"src_key_padding_mask": padding}}
    expected = {name: run(module, x, **mask) for name, mask in masks.items()}
    pack(module)
    assert packed_in(module) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert why(module, "layers.0.self_attn.out_proj") == "the attention around it reads its weight and never calls it"
    assert why(module, "layers.0.self_attn.in_proj_weight").startswith(
        "parameters of MultiheadAttention outside linear layers"
    )
    close(run(module, x), expected["whole"])
    found = run(module, x, **masks["padded"])
    seen = padding if x.shape[0] == 3 else padding.T
    close(found[~seen], expected["padded"][~seen])


def t5(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, **settings)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("gated", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_casts_to_the_type_of_a_packed_weight_gets_that_of_the_layer(tmp_path, gated, dtype):
    module = t5(feed_forward_proj=gated).to(dtype)
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    expected = run(module, **given).logits
    pack(module, head="bf16")
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in packed_in(module)
    assert "lm_head" in packed_in(module)
    found = run(module, **given).logits
    close(found, expected, 0.03)
    module.save_pretrained(tmp_path)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert packed_in(again) == packed_in(module)
    assert torch.equal(run(again, **given).logits, found)
    assert again.encoder.embed_tokens.weight is again.shared.weight


def test_a_vision_model_keeps_its_convolutions():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = run(module, x)
    pack(module)
    assert packed_in(module) == {"3"}
    assert why(module, "0") == "convolutions"
    close(run(module, x), expected)
    vit = pico("vit")
    expected = logits(vit)
    pack(vit)
    assert packed_in(vit)
    assert why(vit, "vit.embeddings.patch_embeddings.projection") == "convolutions"
    assert why(vit, "classifier").endswith("(target_modules='all-linear' includes them)")
    close(logits(vit), expected, 0.05)


def test_a_classifier_is_packed_by_name():
    module = pack(pico("bert"), target_modules=["query", "classifier"], format="int8")
    assert packed_in(module) == {*(f"bert.encoder.layer.{i}.attention.self.query" for i in range(4)), "classifier"}
    assert why(module, "bert.encoder.layer.0.attention.self.key") == "linear layers that target_modules does not match"
    assert why(module, "bert.embeddings.word_embeddings") == "embeddings"
    module = pack(pico("bert"), target_modules="all-linear", exclude_modules=r"bert\.encoder\.layer\.[01].*")
    assert not any(".layer.0." in name or ".layer.1." in name for name in packed_in(module))
    assert {"bert.pooler.dense", "classifier"} < packed_in(module)
    assert why(module, "bert.encoder.layer.1.output.dense") == "linear layers that exclude_modules matches"


def test_settings_that_name_no_layer_are_refused():
    for settings, said in (
        ({"target_modules": ["nothing"]}, "no linear layer's name is or ends with 'nothing'"),
        ({"target_modules": ["0", "nothing"]}, "'nothing'"),
        ({"target_modules": "0.*x"}, "no linear layer's name matches '0.*x'"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules: no linear layer"),
        ({"exclude_modules": ["0", "2"]}, "these settings can change none of the linear layers"),
    ):
        for step in (pliant.PackedLinear, pliant.RTN, lambda **given: pliant.Magnitude(sparsity=0.5, **given)):
            with pytest.raises(StepError, match=said.replace(".*", r"\.\*")):
                pliant.apply(small(8, 8, 8), step(**settings), progress=False)
    for settings, said in (
        ({"target_modules": "("}, "not a valid regular expression"),
        ({"target_modules": []}, "a list of names, a regular expression or 'all-linear'"),
        ({"exclude_modules": 3}, "a list of names, a regular expression or 'all-linear'"),
    ):
        for step in (pliant.PackedLinear, pliant.RTN, pliant.SparAMX):
            with pytest.raises(StepError, match=said):
                step(**settings)
    assert pliant.SparAMX(target_modules=["a"]).to_dict()["target_modules"] == ["a"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_packed_at_all_is_said():
    for module, said in (
        (nn.Linear(8, 8), r"pack torch.nn.Sequential\(layer\)"),
        (nn.Sequential(nn.Conv2d(3, 3, 3)), "Sequential has no linear layers"),
        (nn.Sequential(nn.LazyLinear(4)), "lazy layers"),
        (nn.Sequential(nn.Linear(8, 8, device="meta")), "meta device"),
        (torch.jit.trace(small(8, 8), torch.randn(1, 8)), "TorchScript"),
        (torch.compile(small(8, 8), backend="eager"), "torch.compile"),
    ):
        with pytest.raises(StepError, match=said):
            pack(module)


class Doubled(nn.Linear):
    """Another function of the same weights."""

    def forward(self, x):
        return 2 * super().forward(x)


class Same(nn.Linear):
    """The same function, written in another way."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def normed():
    return parametrizations.weight_norm(nn.Linear(16, 16))


def masked():
    return prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)


def patched():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


def renamed():
    layer = nn.Linear(16, 16)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("made", "said", "values"),
    [
        (lambda: Doubled(16, 16), "computes something other than a linear layer", True),
        (patched, "computes something other than a linear layer", True),
        (normed, "recomputed at each pass", False),
        (masked, "recomputed at each pass", False),
        (renamed, "when it is saved or loaded", True),
        (lambda: nn.Linear(16, 16).to(torch.float8_e4m3fn), "stored as float8_e4m3fn", False),
    ],
)
def test_a_layer_that_is_more_than_its_weight_is_left(made, said, values):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), made()).eval()
    layer = module[1]
    before = copy.deepcopy(dict(layer.state_dict()))
    pack(module)
    assert packed_in(module) == {"0"}
    assert module[1] is layer
    assert any(said in reason for reason in left(module))
    module = nn.Sequential(nn.Linear(16, 16), layer)
    pliant.apply(module, pliant.Magnitude(sparsity=0.5), progress=False)
    assert float((module[0].weight == 0).float().mean()) == 0.5
    unchanged = all(
        torch.equal(a.float(), b.float()) for a, b in zip(layer.state_dict().values(), before.values(), strict=True)
    )
    assert unchanged is not values
    assert any(said in reason for reason in left(module)) is not values


def test_a_class_that_computes_the_same_is_packed():
    torch.manual_seed(0)
    module = nn.Sequential(Same(16, 16)).eval()
    x = torch.randn(3, 16)
    expected = run(module, x)
    assert packed_in(pack(module)) == {"0"}
    close(run(module, x), expected)


def test_adapters_are_left_with_what_they_wrap():
    import peft

    torch.manual_seed(0)
    module = peft.get_peft_model(small(16, 32, 16), peft.LoraConfig(r=4, target_modules=["0"])).eval()
    nn.init.normal_(module.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(3, 16)
    expected = run(module, x)
    pack(module)
    assert packed_in(module) == {"base_model.model.2"}
    assert any("an adapter (Linear) is wrapped around it; merge it first" in reason for reason in left(module))
    close(run(module, x), expected)


def test_hooks_go_with_the_layer():
    module, seen = small(16, 16), []
    module[0].register_forward_hook(lambda _, __, out: seen.append("after") or out * 2)
    handle = module[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    x = torch.randn(3, 16)
    expected = run(module, x)
    pack(module)
    seen.clear()
    close(run(module, x), expected)
    assert seen == ["before", "after"]
    handle.remove()
    seen.clear()
    run(module, x)
    assert seen == ["after"]


def test_shared_layers_and_weights_stay_shared():
    module = Tied().eval()
    expected = run(module, IDS % 50)
    count = sum(p.numel() for p in module.parameters())
    pack(module)
    assert isinstance(module.twice[0], Packed)
    assert module.twice[0] is module.twice[1]
    assert module.up.packed is module.again.packed
    assert module.up is not module.again
    assert module.decoder.tied
    assert torch.equal(module.embedding.weight, Tied().embedding.weight)
    close(run(module, IDS % 50), expected, 0.05)
    held = sum(m.parameters_held() for m in module.modules() if isinstance(m, Packed))
    assert held + sum(p.numel() for p in module.parameters()) == count
    copied = copy.deepcopy(module)
    assert copied.twice[0] is copied.twice[1]
    assert torch.equal(run(copied, IDS % 50), run(module, IDS % 50))


def test_values_that_are_shared_are_changed_once_and_those_of_an_embedding_not_at_all():
    module = pliant.apply(Tied(), pliant.Magnitude(sparsity=0.5), progress=False)
    assert torch.equal(module.embedding.weight, Tied().embedding.weight)
    assert any("share their weight with an embedding" in reason for reason in left(module))
    assert float((module.up.weight == 0).float().mean()) == 0.5
    assert module.up.weight is module.again.weight
    assert module.pliant_history[-1]["weights"] == 2 * 32 * 32
    once, twice = small(64, 64), small(64, 64)
    pliant.apply(once, pliant.RTN(bits=4, group=32), progress=False)
    assert not torch.equal(once[0].weight, twice[0].weight)
    assert 0 < once.pliant_history[-1]["relative_error"] < 0.2


def test_sparamx_takes_any_module():
    module = small(64, 64, 64)
    pliant.apply(module, pliant.SparAMX(sparsity=0.5, sparse="always", target_modules=["0"]), progress=False)
    assert packed_in(module) == {"0"}
    assert module[0].header().sparse
    assert float((module[0].dense().weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((module[2].weight == 0).float().mean()) == 0.0


def test_parameters_that_are_no_layers_are_named():
    module = Experts().eval()
    total = sum(p.numel() for p in module.parameters())
    pack(module)
    record = module.pliant_history[-1]["left"]
    assert record["parameters"] == 4 * 16 * 16 + 4 * 16
    assert record["bytes"] == 4 * record["parameters"]
    assert record["share"] == pytest.approx(record["parameters"] / total)
    assert [kind["names"] for kind in record["reasons"]] == [["stack"], ["router"]]


def test_experts_that_are_not_packed_are_said():
    module = pico("mixtral")
    total = sum(p.numel() for p in module.parameters())
    experts = sum(p.numel() for name, p in module.named_parameters() if ".experts." in name)
    pack(module, format="int4", group=32)
    record = module.pliant_history[-1]
    first = record["left"]["reasons"][0]
    assert first["why"].startswith("stacks of matrices outside linear layers")
    assert first["parameters"] == experts
    assert "model.layers.0.mlp.experts.down_proj" in first["names"]
    assert record["left"]["parameters"] == sum(p.numel() for p in module.parameters())
    assert record["left"]["share"] == pytest.approx(record["left"]["parameters"] / total)
    assert f"Not packed: {record['left']['share']:.1%} of the parameters" in notes_of(record)
    assert f"{experts / total:.1%} stacks of matrices outside linear layers" in notes_of(record)


def test_experts_that_are_not_packed_are_read_all_the_same():
    """What a token is predicted to read: packed layers, the two experts of each layer that it goes to, norms, the
    router."""
    dense, module = pico("mixtral"), pack(pico("mixtral"), format="int8")
    experts = sum(p.numel() for name, p in dense.named_parameters() if ".experts." in name)
    used = experts * dense.config.num_experts_per_tok // dense.config.num_local_experts
    costs = model_costs(module)
    cached = PROMPT * costs["cache_bytes_per_token"]
    others = costs["streamed_bytes"] - cached - packed_bytes(module)
    assert 4 * used < others < 4.2 * used


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_into_a_module_that_is_packed_anew(assign):
    module, other = (
        pack(small(64, 96, 24), format="int4"),
        pack(small(64, 96, 24, seed=1), format="int8", sparse="always"),
    )
    x = torch.randn(2, 5, 64)
    assert not torch.equal(run(module, x), run(other, x))
    other.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
    assert torch.equal(run(module, x), run(other, x))
    assert other[0].header() == module[0].header()


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_a_packed_model_computes_with_the_state_it_was_given_last(name):
    module, other = pack(pico(name)), pack(pico(name, seed=1))
    assert not torch.equal(logits(module), logits(other))
    other.load_state_dict(module.state_dict())
    assert torch.equal(logits(module), logits(other))


def test_a_state_goes_to_a_second_process(tmp_path):
    module = pack(small(64, 96, 24), format="int8")
    x = torch.randn(2, 5, 64)
    torch.save({"state": module.state_dict(), "x": x, "y": run(module, x)}, tmp_path / "state.pt")
    torch.save(module, tmp_path / "module.pt")
    program = f"""
import pliant, torch
from torch import nn
kept = torch.load({str(tmp_path / "state.pt")!r})
module = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 24), nn.GELU()).eval()
pliant.apply(module, pliant.PackedLinear(format="bf16"), progress=False)
module.load_state_dict(kept["state"], strict=True)
whole = torch.load({str(tmp_path / "module.pt")!r}, weights_only=False)
with torch.inference_mode():
    assert torch.equal(module(kept["x"]), kept["y"])
    assert torch.equal(whole(kept["x"]), kept["y"])
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_a_state_of_the_other_kind_is_refused():
    module, dense = pack(small(64, 96)), small(64, 96)
    before = run(module, torch.ones(1, 64))
    with pytest.raises(PackedError, match=r"0\.weight is a dense weight of shape \(96, 64\), but this layer is packed"):
        module.load_state_dict(dense.state_dict())
    broken = module.state_dict()
    broken["0.weight"] = broken["0.weight"].clone()
    broken["0.weight"][300] ^= 1
    with pytest.raises(PackedError, match="checksum"):
        module.load_state_dict(broken)
    assert torch.equal(run(module, torch.ones(1, 64)), before)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        dense.load_state_dict(module.state_dict())


def test_it_can_be_copied_cast_and_compiled_and_does_not_leave_the_cpu():
    module = pack(small(64, 96, 24))
    x = torch.randn(2, 5, 64)
    expected = run(module, x)
    assert torch.equal(run(copy.deepcopy(module), x), expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(module).to(dtype)
        assert cast[0].bias.dtype == cast[0].weight.dtype == dtype
        assert cast[0].packed.dtype == torch.uint8
        found = run(cast, x.to(dtype))
        assert found.dtype == dtype
        close(found.float(), expected)
    assert torch.equal(run(module.half().float(), x.float()).round(decimals=1), expected.round(decimals=1))
    with pytest.raises(PackedError, match="packed layers run on the CPU and cannot be moved to meta"):
        module.to("meta")
    with pytest.raises(PackedError, match=r"cannot be converted to torch\.float32"):
        module.type(torch.float32)
    with pytest.raises(PackedError, match="needs a floating-point input, not int64"):
        module(x.long())


def test_gradients_reach_what_stands_before_a_packed_layer():
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    reference = copy.deepcopy(module)
    pack(module, target_modules=["1"])
    reference[1] = module[1].dense()
    x = torch.randn(3, 16)
    module(x).square().sum().backward()
    reference(x).square().sum().backward()
    close(module[0].weight.grad, reference[0].weight.grad, 1e-4)


def test_a_packed_weight_can_be_read_and_not_written():
    torch.manual_seed(0)
    layer = Packed.of(nn.Linear(64, 40), "bf16")
    weight, dense = layer.weight, layer.dense().weight.detach()
    x = torch.randn(3, 64)
    assert (weight.shape, weight.dtype, weight.device.type, weight.dim()) == ((40, 64), torch.float32, "cpu", 2)
    with torch.inference_mode():
        assert torch.equal(weight.T, dense.T)
        assert torch.equal(weight @ x.T, dense @ x.T)
        assert torch.equal(torch.cat([weight, dense])[:40], dense)
        assert torch.equal(nn.functional.linear(x, weight, layer.bias), layer(x))
    for write in (
        lambda: weight.mul_(2),
        lambda: weight.data.zero_(),
        lambda: weight.__setitem__(0, 1.0),
        lambda: nn.init.normal_(weight),
        lambda: torch.add(dense, dense, out=weight),
    ):
        with pytest.raises(PackedError, match="is read-only"):
            write()
    with pytest.raises(PackedError, match="has no data_ptr"):
        weight.data_ptr()
    assert torch.equal(layer.dense().weight, dense)


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
PAIR = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 48))}
PAIR |= {"vocab_size": 300, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
FAMILIES = {
    "bart": ("BartForConditionalGeneration", PAIR),
    "bert": ("BertForMaskedLM", SIZES),  # the bias of its head is tied, too
    "mamba": ("MambaForCausalLM", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "switch_transformers": (  # scales its logits where the config says that embeddings are tied
        "SwitchTransformersForConditionalGeneration",
        {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        SIZES | CONVOLUTIONS | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_read_weights_or_tie_them_are_packed_and_reload(tmp_path, family):
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    module = model_class(transformers.AutoConfig.for_model(family, **settings)).eval()
    given = {"input_ids": IDS[:1]} if family != "wav2vec2" else {"input_values": torch.randn(1, 800)}
    if module.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS[:1, :4]
    total = sum(p.numel() for p in module.parameters())
    expected = run(module, **given).logits
    pack(module, head="bf16", target_modules="all-linear")
    found = run(module, **given).logits
    close(found, expected)
    held = sum(layer.parameters_held() for layer in module.modules() if isinstance(layer, Packed))
    rest = module.pliant_history[-1]["left"]["parameters"]
    assert rest == sum(p.numel() for p in module.parameters())
    assert held + rest - total in (0, 300)  # a tied bias becomes one of its own
    module.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert packed_in(again) == packed_in(module)
    assert torch.equal(run(again, **given).logits, found)


def llava():
    torch.manual_seed(0)
    text = {
        "model_type": "olmo2",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        text_config=text | {"num_attention_heads": 8},
        vision_config=vision | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14, "projection_dim": 32},
        image_token_index=299,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("whole", [False, True])
def test_the_text_part_of_a_vision_language_model_reloads(tmp_path, whole):
    """Packed by itself or through the whole model, in a fresh process of plain transformers."""
    module = llava()
    if whole:
        pack(module, format="int8", target_modules=r".*language_model.*")
    else:
        pack(module.model.language_model, format="int8")
    names = {name for name, _ in module.named_modules() if name in packed_in(module)}
    assert len(names) == 14
    module.save_pretrained(tmp_path / "once")
    torch.save(run(module, input_ids=IDS % 299).logits, tmp_path / "logits.pt")
    program = f"""
import pliant, torch, transformers
from pliant.runtime.packed_linear import Packed
torch.set_num_threads(1)
expected = torch.load({str(tmp_path / "logits.pt")!r})
place = {str(tmp_path)!r}
for folder in ("once", "twice"):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(f"{{place}}/{{folder}}")
    assert sum(isinstance(m, Packed) for m in model.modules()) == 14
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=torch.tensor({(IDS % 299).tolist()})).logits, expected)
    model.save_pretrained(f"{{place}}/twice")
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_a_transformers_model_inside_a_module_keeps_a_record_of_its_own(tmp_path):
    module = nn.ModuleDict({"body": pico("bert").bert, "head": nn.Linear(32, 2)}).eval()
    pack(module, target_modules="all-linear")
    assert {"head", "body.pooler.dense"} < packed_in(module)
    module.body.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path)
    given = inputs(module.body)
    assert torch.equal(run(again, **given).last_hidden_state, run(module.body, **given).last_hidden_state)
    record_packed(nn.Linear(2, 2), {})  # nothing to record


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_layers_that_another_library_has_quantised_are_left():
    from torch.ao.nn.quantized import dynamic

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), dynamic.Linear(16, 16)).eval()
    quantised = torch.quantize_per_tensor(torch.randn(16, 16), 0.05, 0, torch.qint8)
    module[1].set_weight_bias(quantised, torch.randn(16))  # a new one is not initialised
    x = torch.randn(3, 16)
    expected = run(module, x)
    pack(module)
    assert packed_in(module) == {"0"}
    assert why(module, "1") == "Linear stores its weight in a form of its own"
    close(run(module, x), expected)
