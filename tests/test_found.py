"""Sub-networks that were found before: configurations of the original code, and the published parameter counts."""

import json

import pytest
import torch
import transformers

import pliant
from pico import LAYOUTS, leader, pico
from pliant.anatomy import anatomy_of
from pliant.elastic import Subnet, parameters
from pliant.errors import DataError
from pliant.prune.imported_configs import parse_config, read_config

# The published counts

UNPRUNED = {
    "Llama-2-7B": (
        transformers.LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        transformers.LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8_030_261_248,
    ),
    "Llama-3.2-3B": (
        transformers.LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        3_212_749_824,
    ),
    "Qwen2.5-7B": (
        transformers.Qwen2Config,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
}


@pytest.fixture(scope="module")
def real():
    """The anatomy of a published model, from its shapes alone."""
    known = {}

    def anatomy(name):
        if name not in known:
            config, shape, _ = UNPRUNED[name]
            with torch.device("meta"):
                known[name] = anatomy_of(transformers.AutoModelForCausalLM.from_config(config(**shape)))
        return known[name]

    return anatomy


def upstream_count(anatomy, subnet):
    """Parameters as the original code counts them: it keeps the norms of removed blocks."""
    return parameters(anatomy, subnet) + sum(anatomy.blocks[name].norm_parameters for name in subnet.skip)


@pytest.mark.parametrize("name", UNPRUNED)
def test_the_published_models_have_their_published_size(name, real):
    assert parameters(real(name)) == UNPRUNED[name][2]


LISTED = {
    "Llama-2-7B": (
        5_258_874_880,
        {
            "pruned_attn_idx": [25, 27, 24, 23, 21, 29, 28, 18, 8],
            "pruned_mlp_idx": [8],
            "pruned_mlp_width": {
                "2": 5888,
                "7": 6912,
                "12": 5888,
                "17": 3840,
                "23": 1792,
                "25": 1792,
                "26": 3840,
                "27": 1792,
            },
            "pruned_attn_width": {
                "1": 3328,
                "2": 3328,
                "5": 3968,
                "16": 3968,
                "17": 3584,
                "19": 3840,
                "20": 3968,
                "22": 3968,
                "30": 3968,
            },
        },
    ),
    "Llama-3.1-8B": (
        6_423_842_816,
        {
            "pruned_attn_idx": [25, 26, 20, 24, 23, 21, 27, 19],
            "pruned_mlp_idx": [25],
            "pruned_mlp_width": {
                "7": 5120,
                "10": 12288,
                "11": 1024,
                "15": 4096,
                "18": 1024,
                "19": 3072,
                "20": 8192,
                "23": 3072,
                "24": 2048,
            },
            "pruned_attn_width": {},
        },
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_published_configurations_give_the_published_parameter_counts(name, real, tmp_path):
    total, raw = LISTED[name]
    anatomy = real(name)
    (tmp_path / "pruning_config.json").write_text(json.dumps(raw))
    subnet = read_config(tmp_path / "pruning_config.json", anatomy)
    assert subnet == parse_config(raw, anatomy)
    assert upstream_count(anatomy, subnet) == total
    assert len(subnet.skip) == len(raw["pruned_attn_idx"]) + len(raw["pruned_mlp_idx"])
    assert len(subnet.keep) == len(raw["pruned_attn_width"]) + len(raw["pruned_mlp_width"])
    channels = anatomy.axes["layers.0.mlp.channels"].size
    full = dict.fromkeys(map(str, range(anatomy.depth)), channels)  # upstream may list full widths too
    assert parse_config(raw | {"pruned_mlp_width": full | raw["pruned_mlp_width"]}, anatomy) == subnet


# The specification gives only the totals of these three; their configurations are not in it. The steps of each stage
# and the group sizes are published (sections 3.2 and 3.9), so the one unknown left is how many of the removed blocks
# were attention. That number was solved for from the published total, and the test shows that there is exactly one.
SOLVED = {
    # model: (total, blocks, of them attention, MLP groups, of so many channels, heads)
    "Llama-2-7B": (6_063_132_672, 5, 5, 25, 1024, 12),
    "Llama-3.2-3B": (2_921_769_984, 2, 2, 34, 768, 0),
    "Qwen2.5-7B": (6_090_697_216, 9, 6, 67, 1024, 0),
}


@pytest.mark.parametrize("name", SOLVED)
def test_published_totals_are_those_of_exactly_one_mixture_of_removed_units(name, real):
    total, removed, attention, groups, group, heads = SOLVED[name]
    anatomy = real(name)
    counts = [
        upstream_count(anatomy, mixture(anatomy, n, removed - n, groups, group, heads)) for n in range(removed + 1)
    ]
    found = [n for n, count in enumerate(counts) if count == total]
    assert found == [attention]


def mixture(anatomy, attention, mlps, groups, group, heads):
    """So many units gone, wherever there is room: the last layers lose blocks, the first ones width."""
    last = anatomy.depth - 1
    subnet = Subnet()
    for i in range(attention):
        subnet = subnet.without(f"layers.{last - i}.attention")
    for i in range(mlps):
        subnet = subnet.without(f"layers.{last - i}.mlp")
    channels = anatomy.axes["layers.0.mlp.channels"].size
    most = (channels - 1) // group  # something always stays
    for layer in range(anatomy.depth):
        gone, groups = min(most, groups), groups - min(most, groups)
        if gone:
            subnet = subnet.keeping(f"layers.{layer}.mlp.channels", channels - gone * group)
        if layer < heads:
            axis = anatomy.axes[f"layers.{layer}.attention.kv"]
            subnet = subnet.keeping(axis.name, axis.size - 1)
    assert not groups
    return subnet


# Configurations of the original code


def test_a_removal_list_of_blockpruner_is_read_by_its_longest_entry(tmp_path):
    anatomy = anatomy_of(pico())
    order = {"1": [["mha", 3]], "2": [["mha", 3], ["mlp", 2]], "10": [["mha", 0], ["mha", 3], ["mlp", 2]]}
    path = tmp_path / "del_order.json"
    path.write_text(json.dumps(order))
    expected = Subnet(frozenset({"layers.0.attention", "layers.3.attention", "layers.2.mlp"}))
    assert read_config(path, anatomy) == expected
    assert read_config(str(path), anatomy) == expected


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("falcon", "mixtral")])
def test_a_configuration_of_multipruner_is_read_in_channels(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    group = anatomy.axes[f"layers.0.attention.{leader(name)}"]
    wide = 8 if leader(name) == "heads" else 16  # query channels of one key-value group
    raw = {
        "pruned_attn_idx": [1],
        "pruned_mlp_idx": [2, 0],
        "pruned_attn_width": {"0": 2 * wide, "1": wide, "3": group.size * wide},
        "pruned_mlp_width": {"1": 20, "2": 7},
    }
    expected = Subnet(frozenset({"layers.1.attention", "layers.2.mlp", "layers.0.mlp"}))
    expected = expected.keeping(group.name, 2).keeping("layers.1.mlp.channels", 20)
    assert parse_config(raw, anatomy) == expected
    with pliant.activate(model, expected):
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "widths"), [("falcon", {"pruned_attn_width": {"0": 16}}), ("mixtral", {"pruned_mlp_width": {"1": 16}})]
)
def test_a_configuration_that_narrows_what_this_family_does_not_have_is_refused(name, widths):
    with pytest.raises(DataError, match="axes to cut, not one width"):
        parse_config(widths, anatomy_of(pico(name)))


@pytest.mark.parametrize("missing", ["pruned_attn_idx", "pruned_mlp_idx", "pruned_attn_width", "pruned_mlp_width"])
def test_any_part_of_a_configuration_may_be_missing_or_null(missing):
    anatomy = anatomy_of(pico())
    raw = {"pruned_attn_idx": [1], "pruned_mlp_idx": [2], "pruned_attn_width": {"0": 16}, "pruned_mlp_width": {"1": 7}}
    without = parse_config({key: value for key, value in raw.items() if key != missing}, anatomy)
    assert without == parse_config(raw | {missing: None}, anatomy)
    assert len(without.skip) + len(without.keep) == 3


MALFORMED = {
    "not JSON": "{",
    "no text at all": "",
    "a list": "[1, 2]",
    "a number": "3",
    "an empty object": "{}",
    "other keys": '{"layers": [1]}',
    "blocks of an unknown kind": '{"1": [["ssm", 3]]}',
    "a block without a layer": '{"1": [["mha"]]}',
    "a number for a list of blocks": '{"1": 5}',
    "a block the model does not have": '{"1": [["mha", 99]]}',
    "a layer that is no number": '{"1": [["mha", "first"]]}',
    "an attention the model does not have": '{"pruned_attn_idx": [99]}',
    "an MLP the model does not have": '{"pruned_mlp_idx": [-1]}',
    "indices that are no list": '{"pruned_attn_idx": 3}',
    "indices that are no numbers": '{"pruned_mlp_idx": ["first"]}',
    "widths that are no object": '{"pruned_mlp_width": [20]}',
    "widths of a layer the model does not have": '{"pruned_mlp_width": {"99": 20}}',
    "widths of a layer that is no number": '{"pruned_mlp_width": {"first": 20}}',
    "a width that is no number": '{"pruned_mlp_width": {"1": "wide"}}',
    "a width of part of a group": '{"pruned_attn_width": {"1": 24}}',
    "a width of nothing": '{"pruned_mlp_width": {"1": 0}}',
    "a negative width": '{"pruned_attn_width": {"1": -16}}',
    "a width beyond the dense one": '{"pruned_mlp_width": {"1": 49}}',
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_configuration_is_refused(kind, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(MALFORMED[kind])
    with pytest.raises(DataError):
        read_config(path, anatomy_of(pico()))


def test_a_configuration_that_cannot_be_read_is_refused_naming_the_file(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_config(path, anatomy_of(pico()))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.json"):
        read_config(tmp_path / "binary.json", anatomy_of(pico()))
