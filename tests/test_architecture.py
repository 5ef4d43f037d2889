import pytest
import yaml

from pico import ARCHITECTURES, pico
from pliant.anatomy import anatomy_of
from pliant.architecture import catalogue, families, parse
from pliant.elastic import check
from pliant.errors import ArchitectureError

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
    assert set(catalogue()) == set(ARCHITECTURES) == set(families())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"axes": {"channels": {}}}, "needs 'size'"),
        ({"axes": {"channels": {"size": "intermediate_size", "follows": "heads"}}}, "follows 'heads'"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"layers": None}, "'layers' is missing"),
        ({"blocks": {"mlp": {"weights": {}}}}, "needs 'module'"),
        ({"blocks": {"mlp": {"module": "m", "weights": {"up": ["width", "hidden"]}}}}, "'width' is no axis"),
        ({"blocks": {"mlp": {"module": "m", "output": "list", "weights": {}}}}, "'tensor' or 'tuple'"),
    ],
)
def test_a_faulty_file_is_refused_with_the_fault(change, told):
    raw = {**yaml.safe_load(GOOD), **change}
    raw = {key: value for key, value in raw.items() if value is not None}
    with pytest.raises(ArchitectureError, match=told):
        parse("toy", raw)


def test_all_faults_are_told_at_once():
    with pytest.raises(ArchitectureError, match="2 fault"):
        parse("toy", {**yaml.safe_load(GOOD), "colour": 1, "shape": 2})


def test_an_unknown_family_is_refused_and_the_known_ones_are_named():
    from transformers import OPTConfig, OPTForCausalLM

    small = OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ArchitectureError, match=r"'opt'.*gemma2, gpt2, llama"):
        anatomy_of(OPTForCausalLM(small))


def test_something_that_is_not_a_model_is_refused():
    import torch

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

    from pliant.anatomy import anatomy

    architecture = copy.deepcopy(catalogue()["llama"])
    change(architecture)
    known = anatomy.architecture_of
    anatomy.architecture_of = lambda _: architecture
    try:
        return anatomy_of(model)
    finally:
        anatomy.architecture_of = known


def test_the_self_check_finds_a_file_that_swaps_two_axes():
    # a square model, where shapes alone give nothing away
    model = pico("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8)

    def change(architecture):
        weights = architecture.blocks[1].weights
        weights["gate_proj"], weights["down_proj"] = weights["down_proj"], weights["gate_proj"]

    anatomy = _lie(model, change)
    with pytest.raises(ArchitectureError, match="reordering units moved the logits"):
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
