"""Axes in groups that are units of another axis: whole groups are cut, and equally many units in each that stays."""

import json
import random
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache

import pliant
from pico import FAMILIES, IDS, config, head_of, logits, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.architecture import catalogue, parse
from pliant.checkpoint.per_layer_config import write
from pliant.cli.show import show_inspection
from pliant.compat.cache_argument import cache_argument
from pliant.criteria.l1 import l1_norms
from pliant.criteria.unit_fisher import loss_increases
from pliant.elastic import Subnet, check, extract, parameters, reorder
from pliant.elastic.reorder import restore
from pliant.errors import ArchitectureError, ArtefactError, SubnetError
from pliant.prune import width_moves

DELTA = tuple(name for name in FAMILIES if name in ("qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"))
SCANS = {"mamba2": 4, "bamba": 6, "nemotron_h": 4, "granitemoehybrid": 6, "falcon_h1": 6}  # heads in each of two groups
SHAPES = dict.fromkeys(DELTA, (3, 2, "key", "value"))  # groups, units in each, the axes of both
SHAPES |= {name: (2, heads, "group", "scan") for name, heads in SCANS.items()}
pytestmark = pytest.mark.filterwarnings("ignore")  # of kernels that this machine does not have


def block_of(model):
    """The first block whose units are in groups."""
    return next(block for block in anatomy_of(model).blocks.values() if block.role == "scan")


def mixer_of(model, block):
    base = model.base_model
    return base.layers[block.layer].get_submodule(block.spec.module)


def subnet_of(block, name, groups, units):
    """That many groups with that many units in each."""
    count, _, grouping, grouped = SHAPES[name]
    return Subnet().keeping(f"{block.name}.{grouping}", groups).keeping(f"{block.name}.{grouped}", units * count)


def zeroed(name, dropped):
    """The model whose first scan computes without some units."""
    model = pico(name)
    mixer = mixer_of(model, block_of(model))
    with torch.no_grad():
        if name in SCANS:  # no input of the scan: its output is zero before the norm
            for tensor in (mixer.conv1d.weight, mixer.conv1d.bias):
                tensor.view(len(tensor), -1)[: mixer.intermediate_size].unflatten(0, (-1, 8))[dropped] = 0
        else:
            matrix = mixer.o_proj if name == "olmo_hybrid" else mixer.out_proj
            matrix.weight.unflatten(1, (-1, 10))[:, dropped] = 0
    return model


def step_by_step(model):
    """The last logits when the last tokens are read one by one from a cache."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(IDS[:, :6], **cache_argument(model, cache), use_cache=True)
        for token in (6, 7, 8):
            at = torch.tensor([[token]] * 2)  # Bamba would begin at 0 again
            given = {"position_ids": at} if model.config.model_type == "bamba" else {}
            read = model(IDS[:, token : token + 1], **cache_argument(model, cache), use_cache=True, **given).logits
    return read[:, -1]


@cache
def decodes(name):
    """Whether transformers decodes the dense model exactly; 5.14 does not for Nemotron-H and Falcon-H1."""
    model = pico(name)
    try:
        return torch.allclose(step_by_step(model), logits(model)[:, -1], atol=2e-4)
    except KeyError:
        return False


@pytest.mark.parametrize("name", SHAPES)
def test_every_number_of_groups_and_units_is_exact(name, tmp_path):
    count, size, grouping, grouped = SHAPES[name]
    every = [(groups, units) for groups in range(1, count + 1) for units in range(1, size + 1)]
    for place, (groups, units) in enumerate(random.Random(0).sample(every[:-1], 4)):
        model = pico(name)
        block, anatomy = block_of(model), anatomy_of(model)
        subnet = subnet_of(block, name, groups, units)
        dropped = [
            group * size + unit
            for group, unit in product(range(count), range(size))
            if group >= groups or unit >= units
        ]
        expected = logits(zeroed(name, dropped))
        with pliant.activate(model, subnet):
            assert (logits(model) - expected).abs().max() < 2e-5 * expected.abs().max()
        extract(model, anatomy, subnet)
        assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, subnet)
        write(model)
        model.save_pretrained(tmp_path / str(place))
        entry = json.loads((tmp_path / str(place) / "config.json").read_text())["per_layer_config"][str(block.layer)]
        keys = {axis: catalogue()[name].axes[axis].config_key for axis in (grouping, grouped)}
        sizes = {grouping: groups, grouped: groups * units}
        full = {grouping: count, grouped: count * size}
        assert entry == {keys[axis]: sizes[axis] for axis in sizes if sizes[axis] != full[axis]}
        again = head_of(name).from_pretrained(tmp_path / str(place)).eval()
        assert torch.allclose(logits(again), expected, atol=2e-5 * expected.abs().max().item())
        assert not decodes(name) or torch.allclose(step_by_step(again), logits(again)[:, -1], atol=2e-4)
        axes = anatomy_of(again).blocks[block.name].axes
        assert (axes[grouping].size, axes[grouped].size, axes[grouped].groups) == (groups, groups * units, groups)


@pytest.mark.parametrize("name", ["qwen3_5_text", "nemotron_h"])
def test_a_model_whose_groups_were_cut_is_cut_again(name, tmp_path):
    count, size, grouping, grouped = SHAPES[name]
    model = pico(name)
    block = block_of(model)
    extract(model, anatomy_of(model), subnet_of(block, name, count, size - 1))
    check(model)
    anatomy = anatomy_of(model)
    subnet = Subnet().keeping(f"{block.name}.{grouping}", count - 1)
    with pliant.activate(model, subnet):
        activated = logits(model)
    extract(model, anatomy, subnet)
    write(model)
    model.save_pretrained(tmp_path)
    again = head_of(name).from_pretrained(tmp_path).eval()
    assert (logits(again) - activated).abs().max() < 5e-6
    check(again)
    assert anatomy_of(again).axes[f"{block.name}.{grouped}"].size == (count - 1) * (size - 1)


@pytest.mark.parametrize("name", SHAPES)
def test_groups_are_reordered_whole_and_units_within_them(name):
    count, size, grouping, grouped = SHAPES[name]
    model = pico(name)
    block, anatomy, dense = block_of(model), anatomy_of(model), logits(model)
    draw = torch.Generator().manual_seed(1)
    of_groups = torch.arange(count).roll(1)
    of_units = torch.cat([torch.randperm(size, generator=draw) + group * size for group in range(count)])
    reorder(model, anatomy, {f"{block.name}.{grouping}": of_groups, f"{block.name}.{grouped}": of_units})
    assert (logits(model) - dense).abs().max() < 2e-5 * dense.abs().max()
    # the first unit of the first group is now the one that both orders put first: counted in the old groups
    stays = of_units.view(count, size)[of_groups[0], 0].item()
    expected = logits(zeroed(name, [unit for unit in range(count * size) if unit != stays]))
    with pliant.activate(model, subnet_of(block, name, 1, 1)):
        assert (logits(model) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["qwen3_5_text", "mamba2"])
def test_a_group_is_as_important_as_what_is_in_it(name):
    count, size, grouping, grouped = SHAPES[name]
    model = pico(name)
    block, anatomy = block_of(model), anatomy_of(model)
    windows = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    for sizes in (pliant.importance(model), loss_increases(model, anatomy, windows)):
        assert sizes[f"{block.name}.{grouping}"].shape == (count,)
        assert sizes[f"{block.name}.{grouped}"].shape == (count * size,)
    mixer, own = mixer_of(model, block), l1_norms(model, anatomy)[f"{block.name}.{grouping}"]
    if name == "qwen3_5_text":  # each query and key row counts once for every value head
        qkv = mixer.in_proj_qkv.weight.detach().double().abs().sum(1)
        query, key, value = (rows.view(count, -1).sum(1) for rows in qkv.split([24, 24, 60]))
        rest = [mixer.in_proj_z, mixer.in_proj_a, mixer.in_proj_b]
        gates = sum(matrix.weight.detach().double().abs().sum(1).view(count, -1).sum(1) for matrix in rest)
        assert torch.allclose(own, size * (query + key) + value + gates)
    else:  # B and C are read by all heads of a group
        rows = mixer.in_proj.weight.detach().double().abs().sum(1).split([64, 64, 20, 20, 8])
        gate, x, b, c, steps = (part.view(count, -1).sum(1) for part in rows)
        assert torch.allclose(own, gate + x + steps + size * (b + c))


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("qwen3_5_text", {"linear_num_value_heads": 4}, "4 value in 3 groups; .* must be a multiple of 3"),
        (
            "qwen3_5_text",
            {"linear_num_key_heads": 2},
            "6 value; the dense model has 4 in these 2 groups, so it must be between 1 and 4",
        ),
        (
            "qwen3_5_moe_text",
            {"linear_num_key_heads": 2, "linear_num_value_heads": 3},
            "3 value in 2 groups; every group keeps equally many",
        ),
        ("mamba2", {"num_heads": 5}, "5 scan in 2 groups; every group keeps equally many"),
        ("mamba2", {"n_groups": 1}, "8 scan; the dense model has 4 in these 1 groups"),
        ("nemotron_h", {"n_groups": 0}, "0 group; the dense model has 2, so it must be between 1 and 2"),
    ],
)
def test_unequal_groups_written_by_hand_are_refused(name, entry, message):
    cut = config(name)
    cut.per_layer_config = {0: entry}
    cut.pliant_dense_layers = {}
    with pytest.raises(ArtefactError, match=message):
        head_of(name).from_config(cut)


def test_a_layer_whose_units_are_not_in_equal_groups_is_refused():
    model = pico("qwen3_5_text")
    extract(model, anatomy_of(model), Subnet())
    mixer = mixer_of(model, block_of(model))
    for holder, rows in ((mixer.in_proj_z, 50), (mixer.in_proj_a, 5), (mixer.in_proj_b, 5)):
        holder.weight = torch.nn.Parameter(holder.weight[:rows])
    mixer.A_log, mixer.dt_bias = torch.nn.Parameter(mixer.A_log[:5]), torch.nn.Parameter(mixer.dt_bias[:5])
    mixer.in_proj_qkv.weight = torch.nn.Parameter(mixer.in_proj_qkv.weight[:-10])
    mixer.conv1d.weight = torch.nn.Parameter(mixer.conv1d.weight[:-10])
    mixer.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight[:, :-10])
    with pytest.raises(ArchitectureError, match=r"layers\.0\.delta\.value: 5 value are not in 3 equal groups"):
        anatomy_of(model)


@pytest.mark.parametrize(
    ("axis", "word"), [("steps", "follow no other"), ("value", "groups"), ("none", "keep at least 1 unit")]
)
def test_only_a_plain_axis_can_name_groups(axis, word):
    raw = json.loads(json.dumps(catalogue()["qwen3_5_text"].raw))
    raw["axes"]["none"] = {"size": "intermediate_size", "least": 0}
    raw["axes"]["channels"]["copies"] = axis
    with pytest.raises(ArchitectureError, match=f"axis 'channels': copies names the axis '{axis}', .*{word}"):
        parse("x", raw)


def test_groups_that_no_weight_has_need_an_attribute():
    model = pico("mamba2")
    raw = json.loads(json.dumps(catalogue()["mamba2"].raw))
    del raw["blocks"]["mamba"]["attributes"]["n_groups"]
    model.config.pliant_architecture = raw
    with pytest.raises(ArchitectureError, match="no weight has the axis 'group', and no attribute holds its number"):
        anatomy_of(model)


def test_a_norm_without_groups_of_its_own_is_over_all_of_them():
    model = pico("mamba2")
    norm = mixer_of(model, block_of(model)).norm
    vars(norm).pop("group_size", None)  # as in older transformers
    found = block_of(model)
    assert [weight.rescaled for weight in found.weights if weight.path == "mixer.norm.weight"] == ["width"]
    epsilon = next(attribute for attribute in found.attributes if attribute.epsilon is not None)
    assert found.value(epsilon, {"group": 1}) == 2 * epsilon.epsilon


@pytest.mark.parametrize("name", [*DELTA, "qwen3_next"])
def test_states_stay_in_float32_and_slots_move(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    extract(model, anatomy, Subnet().without("layers.0.delta", "layers.1.attention"))
    assert model.model.layers[2].linear_attn.layer_idx == 0
    assert model.model.layers[3].self_attn.layer_idx == 1
    assert torch.allclose(step_by_step(model), logits(model)[:, -1], atol=2e-4)
    padded, mask = torch.cat([torch.zeros_like(IDS[:, :3]), IDS], 1), torch.ones(2, 12, dtype=torch.long)
    mask[:, :3] = 0
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    cached, uncached = (model.generate(padded, use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached, uncached)
    cache = DynamicCache(config=model.config)
    model.to(torch.bfloat16)(IDS, **cache_argument(model, cache), use_cache=True)
    states = cache.layers[0].recurrent_states
    states = states if isinstance(states, torch.Tensor) else next(iter(states.values()))
    assert states.dtype == torch.float32


def test_the_text_model_of_a_composite_is_cut(tmp_path):
    text = config("qwen3_5_text").to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    whole = transformers.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(whole).eval()
    anatomy, block = anatomy_of(model), "layers.0.delta"
    subnet = Subnet().without("layers.2.delta").keeping(f"{block}.key", 2).keeping(f"{block}.value", 3)
    with pliant.activate(model, subnet):
        activated = logits(model)
    extract(model, anatomy, subnet)
    write(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert (logits(again) - activated).abs().max() < 5e-6
    alone, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert alone.config.model_type == "qwen3_5_text"
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert (logits(alone.eval()) - activated).abs().max() < 5e-6


TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])


@pytest.mark.parametrize("name", DELTA)
@pytest.mark.parametrize("step", [pliant.MultiPruner, pliant.FisherPruner, pliant.KnapsackPruner])
def test_pruners_narrow_them(name, step):
    model = pico(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    single = {} if step is pliant.MultiPruner else {"group": 1}
    pliant.apply(model, step(ratio=0.2, samples=4, seqlen=24, **single), TEXT, tokenizer=tokenizer(), progress=False)
    assert 0.2 <= 1 - sum(parameter.numel() for parameter in model.parameters()) / before < 0.3
    assert torch.allclose(step_by_step(model), logits(model)[:, -1], atol=2e-4)


def test_an_inspection_counts_what_one_unit_of_a_group_saves(capsys, monkeypatch):
    model = pico("qwen3_5_text")
    found = pliant.inspect(model)
    axes = found["blocks"][0]["axes"]
    assert axes["value"] == {
        "units": 6,
        "width": 10,
        "parameters_per_unit": 3 * 10 * 32 + 2 * 32 + 10 * 4 + 2,
        "groups": 3,
    }
    assert axes["key"]["parameters_per_unit"] == 2 * 8 * (32 + 4) + 2 * axes["value"]["parameters_per_unit"]
    monkeypatch.setenv("COLUMNS", "200")
    show_inspection(found)
    assert "value: 6 x 10, 1,066 parameters each, equally many in each of 3 groups" in capsys.readouterr().out


def test_whole_groups_are_moves_of_their_own():
    model = pico("mamba2")
    anatomy, job = anatomy_of(model), SimpleNamespace(model=model)
    groups = pliant.MultiPruner(ratio=0.4, mlp_group=4).mlp_groups(job, anatomy)
    assert (groups["group"], groups["scan"]) == (1, 1)
    assert Subnet().keeping("layers.0.mamba.group", 1) in {
        move.subnet for move in width_moves(anatomy, groups)(Subnet())
    }


def copied(model):
    """The first state of which each group has a copy, and an order that differs in every copy."""
    axis = block_of(model).state_axis
    draw = torch.Generator().manual_seed(3)
    return axis, torch.stack([torch.randperm(axis.size, generator=draw) for _ in range(axis.copies)])


@pytest.mark.parametrize("name", SCANS)
def test_copies_are_reordered_one_by_one_and_with_their_groups(name):
    model = pico(name)
    block, anatomy, dense = block_of(model), anatomy_of(model), logits(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    axis, order = copied(model)
    assert axis.shape == order.shape == (2, axis.size)
    orders = {axis.name: order, f"{block.name}.group": torch.tensor([1, 0])}
    for given in ({axis.name: order}, orders):
        reorder(model, anatomy, given)
        assert not torch.equal(
            before[next(key for key in before if "in_proj" in key)], mixer_of(model, block).in_proj.weight
        )
        assert (logits(model) - dense).abs().max() < 2e-5 * dense.abs().max()
        restore(model, anatomy, given)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    # a cut keeps the first units of every copy: counted in the old groups
    mixer, size = mixer_of(model, block), axis.size
    with torch.no_grad():
        last = torch.cat([order[copy, 2:] + copy * size for copy in range(2)])
        mixer.conv1d.weight[mixer.intermediate_size + last] = 0
        mixer.conv1d.bias[mixer.intermediate_size + last] = 0
    expected = logits(model)
    reorder(model, anatomy, orders)
    with pliant.activate(model, Subnet().keeping(axis.name, 2)):
        assert (logits(model) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_an_order_for_each_copy_must_be_a_permutation_of_each():
    model = pico("mamba2")
    axis, order = copied(model)
    for wrong in (order[:1], order.view(-1), torch.stack([order[0], order[0].clamp(1)])):
        with pytest.raises(SubnetError, match=rf"the order given for {axis.name} is not a permutation of {axis.size}"):
            reorder(model, anatomy_of(model), {axis.name: wrong})


def test_copies_whose_units_correspond_are_refused_by_the_self_check():
    """B and C of a group meet, so they are not copies of each other; one order of all units would not show it."""
    raw = json.loads(json.dumps(catalogue()["mamba2"].raw).replace('"state", "state"', '"state"'))
    raw["axes"] |= {"state": {"size": "state_size", "copies": "2 * n_groups", "least": 0}}
    raw["blocks"]["mamba"]["attributes"]["conv_dim"] = ["scan.width", "state.width"]
    raw["axes"]["group"]["cut"] = False  # such a group could not be cut either
    raw["axes"]["scan"]["cut"] = False
    model = pico("mamba2")
    model.config.pliant_architecture = raw
    anatomy, dense = anatomy_of(model), logits(model)
    state = anatomy.axes["layers.0.mamba.state"]
    assert state.copies == 4
    for alike in (True, False):
        order = copied(pico("mamba2"))[1][0]
        orders = {state.name: order if alike else torch.stack([order, *[torch.arange(state.size)] * 3])}
        reorder(model, anatomy, orders)
        assert ((logits(model) - dense).abs().max() < 2e-5 * dense.abs().max()) == alike
        restore(model, anatomy, orders)
    with pytest.raises(ArchitectureError, match="reordering units changed the logits"):
        check(model)


def test_an_axis_that_follows_one_with_copies_has_the_same():
    raw = json.loads(json.dumps(catalogue()["mamba2"].raw))
    raw["axes"]["other"] = {"size": "state_size", "follows": "state"}
    with pytest.raises(
        ArchitectureError, match=r"axis 'other' follows 'state', .* it must have the same copies: 'group'"
    ):
        parse("x", raw)
    raw["axes"]["other"]["copies"] = "group"
    parse("x", raw)
