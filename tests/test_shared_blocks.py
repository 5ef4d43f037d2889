"""Blocks that several layers share and blocks inside others, on zamba2: layers 1 and 4 share one transformer block, 2
and 5 another."""

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import pliant
from pico import IDS, SCANS, logits, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.checkpoint.per_layer_config import write
from pliant.cli.show import show_inspection
from pliant.criteria.block_ranking import influence
from pliant.criteria.unit_fisher import loss_increases
from pliant.elastic import Subnet, extract, macs, parameters
from pliant.errors import ArchitectureError, ArtefactError, DataError, StepError, SubnetError
from pliant.prune.imported_configs import parse_config
from pliant.prune.put_back import Removal, put_backs
from pliant.prune.ratio_target import by_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the kernels of Mamba are not installed
    pytest.mark.skipif(not SCANS, reason="the scan of this transformers is not a function"),
]
TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])
HYBRID = (1, 2, 4, 5)
OWN = {"attention": 3 * (4 * 64 + 64 * 4), "mlp": 4 * 32 + 96 * 4, "linear": 32 * 32}  # of one layer
SHARED = {"attention": 3 * 64 * 64 + 32 * 64 + 64, "mlp": 96 * 32 + 32 * 48 + 32}
# 8 heads of width 8 in 2 groups, state 10
MAMBA = 32 * (64 + 64 + 40 + 8) + 104 * 4 + 104 + 3 * 8 + 64 + 64 * 32 + 32


def every(kind):
    return [f"layers.{layer}.{kind}" for layer in HYBRID]


REMOVALS = {  # blocks -> parameters that they save
    "a use of an attention": (["layers.1.attention"], OWN["attention"]),
    "the last use of an attention": (
        ["layers.1.attention", "layers.4.attention"],
        2 * OWN["attention"] + SHARED["attention"],
    ),
    "every attention": (every("attention"), 4 * OWN["attention"] + 2 * SHARED["attention"]),
    "a use of an MLP": (["layers.5.mlp"], OWN["mlp"]),
    "every MLP": (every("mlp"), 4 * OWN["mlp"] + 2 * SHARED["mlp"]),
    "a shared block": (["layers.1.shared"], sum(OWN.values())),
    "every shared block": (every("shared"), 4 * sum(OWN.values()) + 2 * sum(SHARED.values())),
    "the first Mamba block": (["layers.0.mamba"], MAMBA),
    "the first Mamba block with a shared one": (["layers.1.mamba"], MAMBA + sum(OWN.values())),
    "the last Mamba block with a shared one": (["layers.5.mamba"], MAMBA + sum(OWN.values())),
    "all but one of them": (
        [f"layers.{layer}.mamba" for layer in HYBRID[:3]],
        3 * (MAMBA + sum(OWN.values())) + sum(SHARED.values()),
    ),
}


def generated(model, mask=None, **options):
    mask = torch.ones_like(IDS) if mask is None else mask
    given = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(IDS, **given, **options)


def saved(model, folder):
    write(model)
    model.save_pretrained(folder)
    return folder


def reloaded(folder):
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, told = loaded
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def cut(subnet):
    model = pico("zamba2")
    extract(model, anatomy_of(model), subnet)
    return model


@pytest.mark.parametrize("kind", REMOVALS)
def test_a_removal_is_exact_and_saves_parameters_memory_and_file(kind, tmp_path):
    blocks, saves = REMOVALS[kind]
    model, subnet = pico("zamba2"), Subnet().without(*blocks)
    anatomy = anatomy_of(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert whole - parameters(anatomy, subnet) == saves
    with pliant.activate(model, subnet):
        activated = logits(model)
    assert not torch.allclose(activated, logits(model), atol=1e-3)
    assert macs(anatomy, subnet) < macs(anatomy)
    extract(model, anatomy, subnet)
    torch.testing.assert_close(logits(model), activated, rtol=0, atol=5e-6)
    again = reloaded(saved(model, tmp_path))
    torch.testing.assert_close(logits(again), activated, rtol=0, atol=5e-6)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a mapping
    for small in (model, again):
        memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // 4 for p in small.parameters()}
        assert sum(memory.values()) == parameters(anatomy_of(small)) == on_disk == whole - saves
    padded = torch.ones_like(IDS)
    padded[1, :4] = 0
    assert generated(again, padded).equal(generated(again, padded, use_cache=False))


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 3}])
def test_tokens_are_counted_without_any_attention(options):
    model = cut(Subnet().without(*every("attention"), "layers.1.mamba"))
    padded = torch.ones_like(IDS)
    padded[1, :4] = 0
    uncached = generated(model, padded, use_cache=False, **{k: v for k, v in options.items() if k == "num_beams"})
    assert generated(model, padded, **options).equal(uncached)


def test_shared_heads_and_channels_are_cut_in_every_layer_and_counted_once(tmp_path):
    subnet = Subnet().keeping("tied.layers.1.attention.kv", 3).keeping("tied.layers.2.mlp.channels", 40)
    model = pico("zamba2")
    anatomy = anatomy_of(model)
    heads = 16 * (4 * 64 + 2 * 3 * 4) - 16 * 32  # q, k, v, o, and the adapters of two layers
    assert parameters(anatomy) - parameters(anatomy, subnet) == heads + 8 * (3 * 32 + 2 * 2 * 4)
    with pliant.activate(model, subnet):
        activated = logits(model)
    extract(model, anatomy, subnet)
    shared = [model.model.layers[layer].shared_transformer for layer in HYBRID]
    assert shared[0].self_attn.q_proj.weight is shared[2].self_attn.q_proj.weight
    assert [one.self_attn.q_proj.weight.shape[0] for one in shared] == [48, 64, 48, 64]
    assert [one.feed_forward.down_proj.weight.shape[1] for one in shared] == [48, 40, 48, 40]
    again = reloaded(saved(model, tmp_path))
    torch.testing.assert_close(logits(again), activated, rtol=0, atol=5e-6)
    assert sum(p.numel() for p in again.parameters()) == parameters(anatomy, subnet)
    fresh = transformers.AutoModelForCausalLM.from_config(again.config)
    assert sum(p.numel() for p in fresh.parameters()) == parameters(anatomy, subnet)
    twice = Subnet().without("layers.1.shared").keeping("tied.layers.2.attention.kv", 2)
    further = anatomy_of(again)
    with pliant.activate(again, twice):
        activated = logits(again)
    extract(again, further, twice)
    torch.testing.assert_close(logits(again), activated, rtol=0, atol=5e-6)
    torch.testing.assert_close(logits(reloaded(saved(again, tmp_path))), activated, rtol=0, atol=5e-6)


def test_a_cut_that_cuts_nothing_leaves_the_file_of_transformers():
    model = pico("zamba2")
    before = {name for name, _ in model.named_parameters()}
    extract(model, anatomy_of(model), Subnet().keeping("layers.0.mamba.state", 10))
    assert {name for name, _ in model.named_parameters()} == before


def test_a_block_takes_the_blocks_inside_it_along(tmp_path):
    model = pico("zamba2")
    anatomy = anatomy_of(model)
    inner = {f"layers.1.{kind}" for kind in ("attention", "mlp", "shared")}
    with pliant.activate(model, Subnet().without("layers.1.mamba")):
        alone = logits(model)
    with pliant.activate(model, Subnet().without("layers.1.mamba", *inner)):
        assert torch.equal(logits(model), alone)
    assert not inner & {block.name for block in anatomy.may_go({"layers.1.mamba"})}
    extract(model, anatomy, Subnet().without("layers.1.mamba"))
    saved(model, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    assert sorted(raw["per_layer_config"]["1"]["skip"]) == ["attention", "mamba", "mlp", "shared"]
    raw["per_layer_config"]["1"]["skip"] = ["mamba"]
    file.write_text(json.dumps(raw))
    torch.testing.assert_close(logits(reloaded(tmp_path)), alone, rtol=0, atol=5e-6)


def test_layers_that_share_tensors_are_not_cut_differently(tmp_path):
    model = pico("zamba2")
    anatomy, dense = anatomy_of(model), logits(model)
    with pytest.raises(SubnetError, match=r"cut alike: choose 'tied\.layers\.1\.mlp\.channels' instead of"):
        pliant.apply(model, pliant.Cut(subnet=Subnet().keeping("layers.4.mlp.channels", 40)))
    for widths in ({"0": 40}, {"0": 40, "2": 32}):
        with pytest.raises(DataError, match=r"layers\.1\.mlp and layers\.4\.mlp share their tensors, but would keep"):
            pliant.apply(model, pliant.Cut(subnet={"pruned_mlp_width": widths}))
    alike = parse_config({"pruned_mlp_channels": {"0": 40, "2": 40}}, anatomy)
    assert alike == Subnet().keeping("tied.layers.1.mlp.channels", 40)
    assert parse_config({"pruned_mlp_idx": [2], "pruned_mlp_channels": {"0": 40}}, anatomy) == alike.without(
        "layers.4.mlp"
    )
    assert torch.equal(logits(model), dense)
    assert "per_layer_config" not in model.config.to_diff_dict()
    extract(model, anatomy, alike)
    saved(model, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["per_layer_config"]["4"]["intermediate_size"] = 32
    file.write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match="layers that share their tensors must have the same sizes"):
        pliant.load(tmp_path)


def test_adapters_of_another_layer_that_are_not_shared_are_refused():
    with pytest.raises(ArchitectureError, match="belongs to another layer and is not shared with it"):
        anatomy_of(pico("zamba2", tie_word_embeddings=False))


def test_a_shared_block_without_adapters_of_attention_saves_nothing_until_its_last_use_goes():
    model = pico("zamba2", use_shared_attention_adapter=False)
    anatomy = anatomy_of(model)
    assert parameters(anatomy, Subnet().without("layers.1.attention")) == parameters(anatomy)
    pliant.apply(
        model,
        pliant.UnifiedPruner(ratio=0.3, samples=4, seqlen=24),
        TEXT,
        tokenizer=tokenizer(),
        progress=False,
    )
    assert sum(p.numel() for p in model.parameters()) <= 0.7 * parameters(anatomy)


def test_removals_that_share_tensors_are_put_back_in_reverse_order():
    anatomy = anatomy_of(pico("zamba2"))
    names = ["layers.1.attention", "layers.0.mamba", "layers.4.attention"]
    subnets = [Subnet()]
    for name in names:
        subnets.append(subnets[-1].without(name))
    removals = [
        Removal(name, before, after, hurt)
        for name, before, after, hurt in zip(names, subnets[:-1], subnets[1:], [3, 1, 2], strict=True)
    ]
    dense = parameters(anatomy)
    saves = MAMBA + OWN["attention"]
    back = put_backs(by_parameters(anatomy), removals, saves / dense, OWN["attention"], anatomy.coupled())
    subnet = subnets[-1]
    for removal in back:
        subnet = removal.undone(subnet)
    assert [removal.unit for removal in back] == ["layers.4.attention"]
    assert dense - parameters(anatomy, subnet) == saves


def test_a_model_of_2_7_billion_parameters_is_counted_as_published():
    """Both by its own size, and by that of the untied copy with merged adapters that Mamba-Shedder starts from."""
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model("zamba2", n_mamba_heads=80, num_mem_blocks=2)
        anatomy = anatomy_of(transformers.AutoModelForCausalLM.from_config(settings))
    untied = anatomy.rest
    for block in anatomy.blocks.values():
        own = block.parameters({}, tied=False)
        untied += own if block.tied is None else block.parameters({}) - own
    assert untied == 3_828_481_440
    assert parameters(anatomy) == untied - 7 * (91_755_520 + 78_645_760) + 9 * 2_949_120 == 2_662_214_560
    scans = [47, 42, 48, 43, 45, 37, 51, 40, 44, 46, 38, 41, 53, 49, 33, 31, 34, 50]
    published = {"pruned_mlp_idx": [6, 8, 7], "pruned_ssm_idx": scans}
    subnet = parse_config(published, anatomy)
    assert subnet.skip == {f"layers.{layer}.mlp" for layer in (42, 51, 47)}
    assert len(subnet.keep) == len(scans)
    widths = {"0": 3072, "1": 4096, "2": 8192, "4": 6144, "5": 9216}
    with pytest.raises(
        DataError, match=r"layers\.6\.mlp and layers\.18\.mlp share their tensors, but would keep 3072 and"
    ):
        parse_config({**published, "pruned_mlp_channels": widths}, anatomy)


def test_fisher_information_of_a_shared_unit_is_that_of_one_factor_in_all_its_layers():
    model = pico("zamba2")
    anatomy = anatomy_of(model)
    factor = torch.ones(*IDS.shape, 48, requires_grad=True)
    handles = [
        model.model.layers[layer].shared_transformer.feed_forward.down_proj.register_forward_pre_hook(
            lambda _, args: (args[0] * factor,)
        )
        for layer in (1, 4)
    ]
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    (slopes,) = torch.autograd.grad(loss, factor)
    for handle in handles:
        handle.remove()
    found = loss_increases(model, anatomy, IDS)["tied.layers.1.mlp.channels"]
    expected = slopes.double().flatten(0, 1).square().sum(0) / (2 * IDS.numel())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_inner_blocks_are_ranked_by_their_effect_through_the_outer_one():
    model = pico("zamba2")
    ranks = influence(model, anatomy_of(model), IDS)
    assert min(ranks.values()) > 0


def test_shared_matrices_are_not_refitted():
    model = pico("zamba2")
    step = pliant.BlockPruner(ratio=0.15, samples=4, seqlen=24, repair=4)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    dense = pico("zamba2").state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "shared_transformer" in name}
    names = {name for name, tensor in kept.items() if name in dense and not torch.equal(tensor, dense[name])}
    assert not names
    assert any("mamba" in name and not torch.equal(t, dense[name]) for name, t in model.state_dict().items())


def test_adapters_are_trained_where_no_other_layer_reads_the_weights():
    pytest.importorskip("peft")
    model = pico("zamba2")
    given = {"steps": 2, "seqlen": 24, "batch_size": 2, "method": "lora"}
    with pytest.raises(StepError, match="q_proj of this model cannot have an adapter: several layers share its weight"):
        pliant.apply(
            model, pliant.Recover(**given, target_modules=["q_proj"]), TEXT, tokenizer=tokenizer(), progress=False
        )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pliant.apply(model, pliant.Recover(**given), TEXT, tokenizer=tokenizer(), progress=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "model.layers.0.mamba.in_proj.weight" in changed
    assert not any("_proj.weight" in name and "shared_transformer" in name for name in changed)
    assert "model.layers.4.shared_transformer.self_attn.linear_q_adapter_list.2.0.weight" in changed


def test_a_cut_model_is_trained_and_its_layers_still_share_tensors(tmp_path):
    model = cut(Subnet().without("layers.1.attention").keeping("tied.layers.2.mlp.channels", 40))
    before = logits(model)
    step = pliant.Recover(steps=2, seqlen=24, batch_size=2, method="full", learning_rate=1e-3)
    pliant.apply(model, step, TEXT, tokenizer=tokenizer(), progress=False)
    assert not torch.equal(logits(model), before)
    first, second = (model.model.layers[layer].shared_transformer.feed_forward for layer in (2, 5))
    assert first.down_proj.weight is second.down_proj.weight
    torch.testing.assert_close(logits(reloaded(saved(model, tmp_path))), logits(model), rtol=0, atol=5e-6)


def test_inspect_says_what_is_linked_and_what_stays(capsys):
    found = pliant.inspect(pico("zamba2"), self_check=False)
    assert (
        found["limits"][0]
        == "the last mamba in the linear_attention layers stays, because the model counts tokens in it"
    )
    assert "without mamba, shared of the same layer goes, too" in found["limits"]
    assert "attention of layers 1, 4 is shared: it is cut alike there" in found["limits"]
    assert any("delta cannot be removed alone" in limit for limit in pliant.inspect(pico("qwen3_next"))["limits"])
    show_inspection(found)
    assert "- the last mamba in the linear_attention layers stays" in capsys.readouterr().out
