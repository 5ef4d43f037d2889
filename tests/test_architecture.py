import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml

import pliant
from pico import ARCHITECTURES, FAMILIES, IDS, OTHERWISE, config, logits, pico
from pliant.anatomy import anatomy_of, global_size
from pliant.architecture import add_architecture, architecture_of, catalogue, families, known_families, parse
from pliant.checkpoint.per_layer_config import write
from pliant.elastic import Subnet, check, extract
from pliant.errors import ArchitectureError, ArtefactError, SubnetError
from pliant.prune import block_moves, layer_moves

GOOD = """
models: [toy]
layers: model.layers
fixed: {hidden: hidden_size}
axes: {channels: {size: intermediate_size}}
blocks:
  mlp:
    module: mlp
    norms: [norm]
    weights: {up: [channels, hidden], down: [hidden, channels]}
"""


def test_every_file_that_ships_is_valid_and_tested():
    assert set(catalogue()) == {*ARCHITECTURES, *FAMILIES, *OTHERWISE} == set(families())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"axes": {"channels": {}}}, "needs 'size'"),
        ({"axes": {"channels": {"size": "intermediate_size", "follows": "heads"}}}, "follows 'heads'"),
        ({"axes": {"channels": {"size": "built"}}}, "axis 'channels': 'built' must come after a key of pliant's own"),
        ({"axes": {"channels": {"size": "built or mlp_size"}}}, "'built' must come after a key of pliant's own"),
        ({"axes": {"channels": {"size": "mlp_size or 2 * built"}}}, "'built' must come after a key of pliant's own"),
        (
            {"axes": {"channels": {"size": "size or built"}, "narrow": {"size": "size", "follows": "channels"}}},
            "axis 'channels': .* neither follows another nor is followed",
        ),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"layers": None}, "'layers' is missing"),
        ({"blocks": {"mlp": {"weights": {}}}}, "needs 'module'"),
        ({"blocks": {"mlp": {"module": "m", "weights": {"up": ["width", "hidden"]}}}}, "unknown axis 'width'"),
        ({"blocks": {"mlp": {"module": "m", "output": "list", "weights": {}}}}, "'tensor' or 'tuple'"),
        ({"native": {"models": {"toy": {}}, "norm": "norm"}}, "native needs 'embedding'"),
        ({"native": {"models": ["toy"]}}, "models must map model types to window and rotates"),
        ({"native": {"models": {"toy": {"windows": "w"}}}}, "models must map model types to window and rotates"),
        ({"native": {"colour": "red"}}, "native has the unknown key 'colour'"),
        ({"output": "list"}, "output of a layer must be 'tensor' or 'tuple', not 'list'"),
        ({"parts": []}, "the key 'parts': models with several lists of layers are not supported yet"),
        ({"models": "toy"}, "models must be a list of model types, not 'toy'"),
        ({"models": [7]}, r"models must be a list of model types, not \[7\]"),
        ({"layers": ["model", "layers"]}, "layers must be the name of a list of modules, not"),
        ({"fixed": ["hidden_size"]}, r"fixed must map names to values, not \['hidden_size'\]"),
        ({"axes": "channels"}, "axes must map names to values, not 'channels'"),
        ({"blocks": [{"mlp": {}}]}, "blocks must map names to values, not"),
        ({"blocks": {1: {}}}, "blocks must map names to values, not {1: {}}"),
        ({"axes": {"channels": {"size": "intermediate_size", "follows": ["heads"]}}}, r"follows \['heads'\]"),
        ({"native": {"norm": 3}}, "native: norm must be a name, not 3"),
        ({"native": {"models": {"toy": {"window": 3}}}}, "models must map model types to window and rotates"),
    ],
)
def test_a_faulty_file_is_refused_with_the_fault(change, told):
    raw = {**yaml.safe_load(GOOD), **change}
    raw = {key: value for key, value in raw.items() if value is not None}
    with pytest.raises(ArchitectureError, match=told):
        parse("toy", raw)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("module", [], r"module must be a name or a list of names, not \[\]"),
        ("module", {"up": "down"}, "module must be a name or a list of names"),
        ("module", ["fc1", 2], r"module must be a name or a list of names, not \['fc1', 2\]"),
        ("norms", [7], r"norms must be a list of names, not \[7\]"),
        ("slot", ["layer_idx"], r"slot must be the name of an attribute, not \['layer_idx'\]"),
        ("roles", {"up": ["up"]}, "roles must map q, k, .* to weights of the block"),
        ("attributes", ["width"], r"attributes must map names to values, not \['width'\]"),
        ("weights", "up", "weights must map names to values, not 'up'"),
        ("weights", {"up": []}, "weight 'up' of block 'mlp' must be a list of dimensions or 'whole'"),
        ("state", [[]], "state must be one of kv, conv, scan, or a list of these"),
        ("norms", "norm", "norms must be a list of names, not 'norm'"),
        ("residual", -1, "residual must be the index of an argument, counted from 0; not -1"),
        ("residual", True, "residual must be the index of an argument"),
        ("residual", "hidden_states", "residual must be the index of an argument"),
        ("guard", 7, "guard must be a config key, not 7"),
        ("roles", {"up": "middle"}, "roles must map q, k, .* to weights of the block"),
        ("roles", {"top": "up"}, "roles must map q, k, .* to weights of the block"),
        ("roles", ["up"], "roles must map q, k, .* to weights of the block"),
        ("scores", "heads", "scores of block 'mlp': unknown axis 'heads'; choose from: channels, hidden"),
        ("cached", 1, "cached must map config keys to numbers of heads, not 1"),
        (
            "weights",
            {"up": "part"},
            "weight 'up' of block 'mlp' must be a list of dimensions or 'whole', not 'part'",
        ),
        ("weights", {"up?": ["wide", "hidden"]}, "weight 'up' of block 'mlp': unknown axis 'wide'"),
        ("cached", {"multi_query": "n_head - 1"}, "cached 'multi_query' of block 'mlp': 'n_head - 1' is not a size"),
        ("attributes", {"width": "wide"}, "attribute 'width' of block 'mlp': unknown axis 'wide'"),
        ("norm", ["norm"], "block 'mlp' has the unknown key 'norm'"),
        ("role", "memory", "role must be one of attention, mlp, experts, conv, scan, other; not 'memory'"),
        ("state", "kv", "block 'mlp' has a state and needs 'slot'"),
        ("state", ["ring"], r"state must be one of kv, conv, scan, or a list of these; not \['ring'\]"),
        ("state", ["scan"], "a block with the state 'scan' lists the axes that span it under scan_state"),
        ("scan_state", ["channels"], "a block with the state 'scan' lists the axes that span it under scan_state"),
        ("scan_state", ["heads"], "scan_state of block 'mlp': unknown axis 'heads'"),
        ("scan_macs", 0, "scan_macs must be a whole number of at least 1, not 0"),
        ("when", "conv", "when must be a list of names, not 'conv'"),
        ("tied", "yes", "tied must be true or false, not 'yes'"),
        ("needs", ["experts"], r"block 'mlp': needs must be a config key, not \['experts'\]"),
        ("transposed", ["side"], "transposed names 'side', which is not one of its weights"),
        ("elementwise", ["side"], "elementwise names 'side', which is not one of its weights"),
        ("uncalled", ["side"], "uncalled names 'side', which is not one of its weights"),
        ("either", {}, "either must be a list of two or more variants, not {}"),
        ("either", [{"slot": "a"}, {}], "variant 1 of block 'mlp' has the unknown key 'slot'"),
        ("rescale", True, "rescale must be a list of names, not True"),
        ("skip", {"up": "channels"}, "one of its weights to an axis with 'least: 0', not 'up' to 'channels'"),
        ("skip", {"up": ["channels"]}, "skip must map one of its weights"),
        ("counts", 3, "counts must be the name of a call argument, not 3"),
        ("inside", ["mlp"], "inside must be the name of another block, not"),
        ("inside", "mixer", "block 'mlp' is inside 'mixer'; it must be inside a block that all its layers have"),
        ("inside", "mlp", "block 'mlp' is inside itself: mlp inside mlp"),
        ("passes", "channels", "passes must be a dimension under 'fixed', not 'channels'"),
    ],
)
def test_a_faulty_word_about_a_block_is_refused_with_the_fault(key, value, told):
    raw = yaml.safe_load(GOOD)
    raw["blocks"]["mlp"][key] = value
    with pytest.raises(ArchitectureError, match=told):
        parse("toy", raw)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("cut", "no way", "axis 'channels': cut must be true or false, not 'no way'"),
        ("multiple", 0, "axis 'channels': multiple must be a whole number of at least 1, not 0"),
        ("multiple", "8", "multiple must be a whole number of at least 1, not '8'"),
        ("multiple", True, "multiple must be a whole number of at least 1, not True"),
        ("active", 2, "axis 'channels': active must be a config key, not 2"),
        ("activ", "k", "axis 'channels' has the unknown key 'activ'"),
        ("size", "intermediate_size - 1", "size of axis 'channels': 'intermediate_size - 1' is not a size"),
        ("size", "a or b c", "size of axis 'channels': 'b c' is not a size"),
        ("size", "a + ", "size of axis 'channels': 'a \\+ ' is not a size"),
        ("size", ["a"], "size of axis 'channels'"),
        ("unit", "a / b", "unit of axis 'channels': 'a / b' is not a size.*'\\+', '\\*' and '//'"),
        ("unit", True, "unit of axis 'channels': True is not a size"),
        ("normed", 1, "normed must be true or false, not 1"),
        ("least", -1, "least must be a whole number of at least 0, not -1"),
        (
            "only_with",
            "channels",
            "an axis that follows no other and has 'least: 0', not 'channels'",
        ),
        ("only_with", 3, "only_with must name an axis"),
        ("groups", [2], r"groups of axis 'channels': \[2\] is not a size"),
    ],
)
def test_a_faulty_word_about_an_axis_is_refused_with_the_fault(key, value, told):
    raw = yaml.safe_load(GOOD)
    raw["axes"]["channels"][key] = value
    with pytest.raises(ArchitectureError, match=told):
        parse("toy", raw)


def test_a_size_may_be_sums_and_products_of_config_keys():
    made = config("llama", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)

    def size(text):
        return global_size(made, text)

    assert size("hidden_size + intermediate_size") == 80
    assert size("2 * hidden_size + intermediate_size // 3 * 2") == 64 + 32
    assert size("1 + 2 * 3 + 10 // 4") == 9
    assert size("width + hidden_size or 4 * hidden_size") == 128
    assert size("hidden_size * width or 7") == 7  # half a product is none
    for text in ("width", "hidden_size + width", "hidden_act", "tie_word_embeddings"):
        with pytest.raises(ArchitectureError, match="gives no whole number"):
            size(text)
    with pytest.raises(ArchitectureError, match="'hidden_size % 2' is not a size"):
        size("hidden_size % 2")


def test_the_words_of_a_file_are_read():
    raw = yaml.safe_load(GOOD)
    raw["axes"]["channels"] |= {"cut": False, "multiple": 8, "active": "k"}
    raw["blocks"]["mlp"] |= {"module": ["up", "down"], "residual": 1, "guard": "eps", "norms": ["a or b"]}
    raw["blocks"]["mlp"]["weights"] |= {"odd": "whole", "scale?": ["hidden"]}
    read = parse("toy", raw)
    axis, (block,) = read.axes["channels"], read.blocks
    assert (axis.cut, axis.multiple, axis.active) == (False, 8, "k")
    assert (block.modules, block.module, block.prefix) == (("up", "down"), "down", "")
    assert (block.residual, block.guard, block.norms) == (1, "eps", ("a or b",))
    assert block.weights["odd"] is None
    assert block.optional == {"scale"}
    assert parse("toy", yaml.safe_load(GOOD)).blocks[0].prefix == "mlp."


def test_what_a_block_is_has_defaults_and_can_be_said():
    raw = yaml.safe_load(GOOD)
    raw["blocks"] = {name: copy.deepcopy(raw["blocks"]["mlp"]) for name in ("mlp", "mixer", "looker", "conv")}
    raw["blocks"]["looker"] |= {"scores": "channels", "slot": "layer_idx"}
    raw["blocks"]["conv"] |= {"state": ["conv", "scan"], "slot": "index", "when": ["conv"], "tied": True}
    raw["blocks"]["conv"]["scan_state"] = ["channels"]
    read = {block.kind: block for block in parse("toy", raw).blocks}
    assert {kind: (block.role, block.state, block.when) for kind, block in read.items()} == {
        "mlp": ("mlp", (), None),
        "mixer": ("other", (), None),
        "looker": ("attention", ("kv",), None),
        "conv": ("conv", ("conv", "scan"), ("conv",)),
    }
    assert read["conv"].tied
    assert read["conv"].scan_state == ("channels",)
    assert [block.kind for block in parse("toy", raw).blocks_of("full_attention")] == ["mlp", "mixer", "looker"]


def test_a_block_that_a_model_does_not_need_is_not_a_removed_one(tmp_path):
    dense = pico("granitemoehybrid", num_local_experts=0)
    anatomy = anatomy_of(dense)
    assert {block.kind for block in anatomy.blocks.values()} == {"mamba", "attention", "mlp"}
    assert "layers.0.moe" in anatomy_of(pico("granitemoehybrid")).blocks
    assert anatomy.removed() == []
    extract(dense, anatomy, Subnet().without("layers.1.mlp"))  # its norm is its own without experts
    assert anatomy_of(dense).removed() == ["layers.1.mlp"]
    assert not list(dense.model.layers[1].post_attention_layernorm.parameters())
    write(dense)
    assert dense.config.per_layer_config[1].skip == ["mlp"]
    assert not hasattr(dense.config, "pliant_architecture")
    dense.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    written["per_layer_config"]["1"]["skip"] = ["moe"]
    (tmp_path / "config.json").write_text(json.dumps(written), "utf-8")
    with pytest.raises(ArtefactError, match=r"skips 'moe' in layer 1.* has the blocks attention, mlp"):
        pliant.load(tmp_path)


def test_a_renamed_block_is_offered_like_any_other():
    model = pico("llama")
    raw = copy.deepcopy(dict(anatomy_of(model).architecture.raw))
    raw["blocks"]["looker"], raw["blocks"]["mixer"] = raw["blocks"].pop("attention"), raw["blocks"].pop("mlp")
    dense = anatomy_of(model)
    model.config.pliant_architecture = raw
    renamed = anatomy_of(model)
    assert {b.kind for b in renamed.blocks.values()} == {"looker", "mixer"}
    for moves in (block_moves, layer_moves):
        assert [move.unit.count("layers") for move in moves(renamed)(Subnet())] == [1] * len(moves(dense)(Subnet()))
    assert len(renamed.may_go(roles={"attention"})) == 4
    assert renamed.axes_of({"attention"}) == ["kv"]


def test_the_state_of_a_scan_is_spanned_by_axes_of_its_weights():
    model = pico("mamba2")
    raw = copy.deepcopy(dict(anatomy_of(model).architecture.raw))
    raw["axes"]["heads"] = {"size": "num_heads"}
    raw["blocks"]["mamba"]["scan_state"] = ["heads", "state"]
    model.config.pliant_architecture = raw
    with pytest.raises(ArchitectureError, match="lists 'heads' under 'scan_state', but no weight has that axis"):
        anatomy_of(model)


def test_all_faults_are_told_at_once():
    with pytest.raises(ArchitectureError, match="2 fault"):
        parse("toy", {**yaml.safe_load(GOOD), "colour": 1, "shape": 2})


# A family of our own: nothing that ships describes it


COHERE = """
models: [cohere]
layers: model.layers
fixed: {hidden: hidden_size}
axes:
  kv: {size: num_key_value_heads, unit: hidden_size // num_attention_heads}
  heads: {size: num_attention_heads, unit: hidden_size // num_attention_heads, follows: kv}
  channels: {size: intermediate_size}
blocks:
  attention:
    module: self_attn
    norms: [input_layernorm]
    output: tuple
    slot: layer_idx
    scores: heads
    weights: {q_proj: [heads, hidden], k_proj: [kv, hidden], v_proj: [kv, hidden], o_proj: [hidden, heads]}
  mlp:
    module: mlp
    norms: [input_layernorm]
    weights: {gate_proj: [channels, hidden], up_proj: [channels, hidden], down_proj: [hidden, channels]}
"""


def cohere():
    return pico("cohere", hidden_size=48, head_dim=None)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The file of a family of our own, made known for one test."""
    monkeypatch.setattr(known_families, "_added", {})
    file = tmp_path / "ours.yaml"
    file.write_text(COHERE)
    return add_architecture(file)


def test_an_unknown_family_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ArchitectureError, match=r"'cohere'.*gemma2, .*gpt2, .*llama.*add_architecture"):
        anatomy_of(cohere())


def test_a_file_of_our_own_makes_a_family_known(added):
    assert architecture_of("cohere") is added
    assert added.name == "ours"
    assert "cohere" in families()
    model = cohere()
    check(model)
    with pytest.raises(SubnetError):
        extract(model, anatomy_of(model), Subnet().keeping("layers.1.mlp.channels", 0))


@pytest.mark.usefixtures("added")
def test_a_file_of_our_own_goes_before_one_that_ships(tmp_path):
    raw = yaml.safe_load(COHERE.replace("[cohere]", "[llama]"))
    raw["blocks"]["mlp"]["norms"] = ["post_attention_layernorm"]
    raw["axes"]["kv"]["cut"] = False
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump(raw))
    add_architecture(tmp_path / "llama.yaml")
    axes = anatomy_of(pico("llama", hidden_size=48, head_dim=None)).axes
    assert "layers.1.mlp.channels" in axes
    assert "layers.1.attention.kv" not in axes


@pytest.mark.parametrize(
    ("content", "told"), [(None, "cannot read"), ("models: [", "cannot read"), ("colour: red", "unknown key 'colour'")]
)
def test_a_file_that_is_no_architecture_is_refused_and_nothing_becomes_known(content, told, tmp_path, monkeypatch):
    monkeypatch.setattr(known_families, "_added", {})
    if content is not None:
        (tmp_path / "ours.yaml").write_text(content)
    with pytest.raises(ArchitectureError, match=told):
        add_architecture(tmp_path / "ours.yaml")
    assert known_families._added == {}


@pytest.mark.usefixtures("added")
def test_a_model_cut_with_a_file_of_our_own_loads_where_that_file_is_not(tmp_path):
    model = cohere()
    subnet = Subnet().without("layers.0.attention").without("layers.2.mlp").keeping("layers.1.mlp.channels", 9)
    extract(model, anatomy_of(model), subnet.keeping("layers.3.attention.kv", 2))
    write(model)
    model.save_pretrained(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["pliant_architecture"] == yaml.safe_load(COHERE)
    program = textwrap.dedent(f"""
        import torch, transformers, pliant
        from pliant.architecture import catalogue
        from pliant.elastic import Subnet, extract
        from pliant.checkpoint.per_layer_config import write
        assert "cohere" not in catalogue()
        model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "cut")!r}).eval()
        torch.save(model(torch.tensor({IDS.tolist()}), use_cache=False).logits.detach(), {str(tmp_path / "found.pt")!r})
        extract(model, pliant.anatomy_of(model), Subnet().without("layers.1.mlp"))
        write(model)
        model.save_pretrained({str(tmp_path / "further")!r})
        again = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "further")!r}).eval()
        print(sorted(set(pliant.anatomy_of(again).blocks)))
    """)
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert (torch.load(tmp_path / "found.pt") - logits(model)).abs().max() < 5e-6
    gone = {"layers.0.attention", "layers.1.mlp", "layers.2.mlp"}
    assert outcome.stdout.strip() == str(
        sorted(f"layers.{i}.{k}" for i in range(4) for k in ("attention", "mlp") if f"layers.{i}.{k}" not in gone)
    )


def test_a_model_of_a_family_that_ships_carries_no_architecture():
    model = pico("llama")
    extract(model, anatomy_of(model), Subnet().without("layers.1.mlp"))
    write(model)
    assert "pliant_architecture" not in model.config.to_dict()


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("gpt2", {"add_cross_attention": True}, r"layer 0 holds 'crossattention\.c_attn\.weight'"),
        ("bert", {"add_cross_attention": True, "is_decoder": True}, r"layer 0 holds 'crossattention\."),
        ("roberta", {"add_cross_attention": True, "is_decoder": True}, r"layer 0 holds 'crossattention\."),
        ("stablelm", {"qk_layernorm": True}, "holds 'self_attn.q_layernorm.norms.0.weight', which stablelm.yaml"),
    ],
)
def test_a_model_with_more_than_its_file_describes_is_refused_and_what_it_is_is_named(name, overrides, told):
    model = pico(name, **overrides)
    for look in (anatomy_of, check, pliant.check):
        with pytest.raises(ArchitectureError, match=told):
            look(model)


def test_something_that_is_not_a_model_is_refused():
    with pytest.raises(ArchitectureError, match="no config"):
        anatomy_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_self_check_passes_and_leaves_the_model_alone(name):
    model = pico(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check(model)
    assert model.training
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def _lie(model, change):
    """The model's anatomy as a wrong architecture file would give it."""
    import copy

    from pliant.anatomy import read

    architecture = copy.deepcopy(catalogue()["llama"])
    change(architecture)
    known = read.architecture_of
    read.architecture_of = lambda _: architecture
    try:
        return anatomy_of(model)
    finally:
        read.architecture_of = known


def test_the_self_check_says_that_no_block_is_left():
    model = pico("bert")
    every = Subnet(frozenset(anatomy_of(model).blocks))
    assert not extract(model, anatomy_of(model), every).blocks
    with pytest.raises(ArchitectureError, match="every block of this BertForSequenceClassification was removed"):
        check(model)


def test_the_self_check_finds_a_file_that_swaps_two_axes():
    # a square model, where shapes alone give nothing away
    model = pico("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8)

    def change(architecture):
        weights = architecture.blocks[1].weights
        weights["gate_proj"], weights["down_proj"] = weights["down_proj"], weights["gate_proj"]

    anatomy = _lie(model, change)
    with pytest.raises(ArchitectureError, match="reordering units changed the logits"):
        check(model, anatomy)


def test_a_weight_that_the_file_does_not_list_is_refused():
    with pytest.raises(ArchitectureError, match="does not list"):
        _lie(pico("llama"), lambda a: a.blocks[1].weights.pop("up_proj"))


def test_a_weight_that_the_model_does_not_have_is_refused():
    def change(architecture):
        architecture.blocks[1].weights["side_proj"] = architecture.blocks[1].weights["up_proj"]

    with pytest.raises(ArchitectureError, match="has no 'side_proj'"):
        _lie(pico("llama"), change)


def test_a_shape_that_the_file_does_not_explain_is_refused():
    def change(architecture):
        weights = architecture.blocks[1].weights
        weights["down_proj"] = weights["up_proj"]

    with pytest.raises(ArchitectureError, match="has shape"):
        _lie(pico("llama"), change)


def test_an_axis_that_follows_has_the_groups_of_its_leader():
    raw = yaml.safe_load(GOOD)
    raw["axes"]["channels"] |= {"groups": 2}
    raw["axes"]["steps"] = {"size": "intermediate_size", "follows": "channels", "groups": 2}
    with pytest.raises(ArchitectureError, match="axis 'steps': leave groups out; it has the groups of 'channels'"):
        parse("toy", raw)


def test_a_rescaled_norm_must_have_an_epsilon():
    raw = dict(catalogue()["llama"].raw)
    raw["blocks"] = {**raw["blocks"], "mlp": {**raw["blocks"]["mlp"], "rescale": ["down_proj"]}}
    model = pico("llama")
    model.config.pliant_architecture = raw
    with pytest.raises(ArchitectureError, match=r"mlp\.down_proj, which .* lists under 'rescale', has no epsilon"):
        anatomy_of(model)
