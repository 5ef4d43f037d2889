"""Every other family that ships: its layout is proven, and cuts are exact activated, extracted, reloaded and cached."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon_h1

import pliant
from pico import FAMILIES, IDS, config, head_of, logits, pico, tokenizer
from pliant.anatomy import anatomy_of, plain_config
from pliant.checkpoint.per_layer_config import write
from pliant.compat.cache_argument import cache_argument
from pliant.elastic import Subnet, check, extract, parameters
from pliant.errors import ArtefactError
from pliant.exporters.homogeneous import homogeneous
from pliant.prune import width_moves

SCANS = hasattr(falcon_h1, "mamba2_chunk_scan")
_DELTA = {"head_dim": 8, "num_heads": 5, "short_conv_kernel_size": 3, "kda_layers": [1, 3], "full_attn_layers": [2, 4]}
_EXPERTS = {"hybrid_override_pattern": "ME*M*E", "n_routed_experts": 4, "moe_intermediate_size": 24}
_EXPERTS |= {"moe_shared_expert_intermediate_size": 40}
VARIANTS = {name: (name, {}) for name in FAMILIES} | {
    "kimi_linear, low-rank queries and grouped experts": (
        "kimi_linear",
        {"q_lora_rank": 12, "num_experts": 8, "num_expert_group": 2},
    ),
    "deepseek_v3, grouped experts": ("deepseek_v3", {"n_routed_experts": 8, "n_group": 2}),
    "kimi_linear, a config in the checkpoint's own words": (
        "kimi_linear",
        {"linear_attn_config": _DELTA, "layer_types": None, "linear_num_heads": None, "linear_head_dim": None},
    ),
    "qwen3_moe, a layer without experts": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "ernie4_5_moe, no shared expert": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "granitemoehybrid, no experts, one group": ("granitemoehybrid", {"num_local_experts": 0, "mamba_n_groups": 1}),
    "granitemoehybrid, no positions": ("granitemoehybrid", {"position_embedding_type": None}),
    "falcon_h1, no norm": ("falcon_h1", {"mamba_rms_norm": False}),
    "falcon_h1, norm before gate, one group": ("falcon_h1", {"mamba_norm_before_gate": True, "mamba_n_groups": 1}),
    "nemotron_h, experts": ("nemotron_h", _EXPERTS),
    "nemotron_h, experts of a few latent channels": ("nemotron_h", {**_EXPERTS, "moe_latent_size": 20}),
    "jamba, no experts": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
}
VARIANTS = {variant: given for variant, given in VARIANTS.items() if given[0] in transformers.CONFIG_MAPPING}


def narrower(anatomy):
    """Every axis at some allowed number of units."""
    draw, subnet = random.Random(0), Subnet()
    for axis in anatomy.axes.values():
        allowed = [units for units in range(axis.fewest, axis.size) if axis.allows(units)]
        subnet = subnet.keeping(axis.name, draw.choice(allowed)) if allowed else subnet
    return subnet


def cuts(anatomy):
    in_layer = {layer: [b.name for b in anatomy.blocks.values() if b.layer == layer] for layer in range(4)}
    mlps = [b.name for b in anatomy.blocks.values() if b.layer == 2 and not b.spec.state]
    first = in_layer[0][0]
    return [
        Subnet().without(first),
        Subnet().without(*in_layer[3]),
        narrower(anatomy),
        narrower(anatomy).without(first, *mlps),
    ]


def generated(model, **options):
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return model.generate(IDS, pad_token_id=0, **given, **options)


def has_cache(name, **overrides):
    """Whether transformers has a cache for the dense model: 5.14 has none for a layer with an MLP alone, and a
    wrong one for falcon_h1."""
    if name == "falcon_h1" and not SCANS:
        return False
    try:
        DynamicCache(config=config(name, **overrides))
    except KeyError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # some of these families warn about kernels that are not there
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuts_are_exact_in_every_family(variant, tmp_path):
    name, overrides = VARIANTS[variant]
    check(pico(name, **overrides))
    for place, subnet in enumerate(cuts(anatomy_of(pico(name, **overrides)))):
        model = pico(name, **overrides)
        anatomy, dense = anatomy_of(model), logits(model)
        with pliant.activate(model, subnet):
            activated = logits(model)
        assert torch.equal(logits(model), dense)
        assert subnet == Subnet() or not torch.allclose(activated, dense, atol=1e-3)
        extract(model, anatomy, subnet)
        assert (logits(model) - activated).abs().max() < 5e-6
        assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet)
        write(model)
        model.save_pretrained(tmp_path / str(place))
        again, told = head_of(name).from_pretrained(tmp_path / str(place), output_loading_info=True)
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (logits(again.eval()) - activated).abs().max() < 5e-6
        if again.can_generate() and has_cache(name, **overrides):
            assert generated(again).equal(generated(again, use_cache=False))


def test_the_first_convolution_may_go_and_the_last_of_each_state_stays():
    model = pico("lfm2")
    anatomy = anatomy_of(model)
    held = {key: [block.name for block in blocks] for key, blocks in anatomy.holders().items()}
    assert held == {
        (("conv",), "conv"): ["layers.0.conv", "layers.2.conv"],
        (("kv",), "full_attention"): ["layers.1.attention", "layers.3.attention"],
    }
    assert {b.name for b in anatomy.may_go({"layers.0.conv"}) if b.spec.state} == {
        "layers.1.attention",
        "layers.3.attention",
    }
    extract(model, anatomy, Subnet().without("layers.0.conv", "layers.1.attention"))
    assert model.model.layers[2].conv.layer_idx == 0
    assert model.model.layers[3].self_attn.layer_idx == 1
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(IDS, use_cache=False).logits[:, -1]
        model(IDS[:, :-1], **cache_argument(model, cache), use_cache=True)
        assert torch.allclose(
            model(IDS[:, -1:], **cache_argument(model, cache), use_cache=True).logits[:, -1], whole, atol=1e-5
        )


def test_an_axis_may_lose_all_its_units_where_the_file_allows_it(tmp_path):
    model = pico("qwen2_moe")
    raw = copy.deepcopy(dict(anatomy_of(model).architecture.raw))
    raw["axes"]["shared"]["least"] = 0
    model.config.pliant_architecture = raw
    anatomy = anatomy_of(model)
    check(model, anatomy)
    subnet = Subnet().keeping("layers.2.mlp.shared", 0)
    with pliant.activate(model, subnet):
        activated = logits(model)
    extract(model, anatomy, subnet)
    assert model.model.layers[2].mlp.shared_expert.down_proj.weight.shape == (48, 0)
    write(model)
    model.save_pretrained(tmp_path)
    again = head_of("qwen2_moe").from_pretrained(tmp_path).eval()
    assert (logits(model) - activated).abs().max() < 5e-6
    assert (logits(again) - activated).abs().max() < 5e-6
    assert anatomy_of(again).axes["layers.2.mlp.shared"].size == 0


def test_a_size_that_only_a_built_layer_shows_is_written_and_cut_again(tmp_path):
    model = pico("lfm2")
    write(model)
    assert not hasattr(model.config, "mlp_channels")
    dense = anatomy_of(model).axes["layers.0.mlp.channels"].size
    assert dense == model.model.layers[0].feed_forward.w1.out_features != model.config.intermediate_size
    everywhere = [f"layers.{layer}.mlp.channels" for layer in range(4)]
    for units in (200, 100):  # the first cut leaves no tensor of the dense size; it is not written before the second
        extract(model, anatomy_of(model), Subnet(keep=tuple((axis, units) for axis in everywhere)))
    write(model)
    assert plain_config(model.config).mlp_channels == dense
    model.save_pretrained(tmp_path / "cut")
    again = pliant.load(tmp_path / "cut")
    assert torch.equal(logits(again), logits(model))
    extract(again, anatomy_of(again), Subnet().without("layers.0.mlp").keeping("layers.1.mlp.channels", 60))
    write(again)
    again.save_pretrained(tmp_path / "again")
    last = pliant.load(tmp_path / "again")
    assert torch.equal(logits(last), logits(again))
    assert plain_config(last.config).mlp_channels == dense
    assert [last.config.per_layer_config[layer].mlp_channels for layer in (1, 2, 3)] == [60, 100, 100]
    assert {a.size for name, a in anatomy_of(last).axes.items() if "mlp" in name} == {60, 100}


def test_layers_are_dropped_from_a_model_whose_width_only_a_built_layer_shows():
    model = pico("lfm2")
    extract(model, anatomy_of(model), Subnet().without("layers.2.conv", "layers.2.mlp"))
    assert torch.allclose(logits(homogeneous(model)), logits(model), atol=5e-6)
    extract(model, anatomy_of(model), Subnet(keep=tuple((f"layers.{i}.mlp.channels", 100) for i in (0, 1, 3))))
    with pytest.raises(ArtefactError, match=r"w1.weight has shape \(100, 48\), but transformers builds"):
        homogeneous(model)


def test_every_axis_of_a_layer_with_and_without_experts_is_narrowed():
    model = pico("qwen2_moe")
    anatomy, job = anatomy_of(model), SimpleNamespace(model=model)
    groups = pliant.MultiPruner(ratio=0.4, mlp_group=8).mlp_groups(job, anatomy)
    assert groups == {"channels": 8, "dense": 8, "experts": 1, "shared": 8}
    assert {move.unit for move in width_moves(anatomy, groups)(Subnet())} >= {
        "layers.1.mlp.dense",
        "layers.2.mlp.shared",
        "layers.2.mlp.experts",
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ratio"), [("lfm2", 0.19), ("lfm2_moe", 0.1), ("kimi_linear", 0.1)])
def test_a_search_reuses_prefixes_across_mixers_of_two_kinds(name, ratio):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    text = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
    found = []
    for search in ("naive", "exact"):
        step = pliant.BlockPruner(ratio=ratio, samples=4, seqlen=24, search=search)
        model = pliant.apply(pico(name), step, text, tokenizer=tokenizer(), progress=False)
        found.append(model.pliant_history[0]["subnet"])
    assert found[0] == found[1]
    assert found[0]["skip"]


def test_every_group_of_experts_keeps_as_many_as_a_token_uses():
    axis = anatomy_of(pico("deepseek_v3", n_routed_experts=12, n_group=2)).axes["layers.1.mlp.experts"]
    assert [units for units in range(1, 13) if axis.allows(units)] == [4, 6, 8, 10, 12]
