"""The savings of a removal, counted or measured in milliseconds."""

import json
import random
from itertools import pairwise
from math import prod

import pytest
import torch
from transformers import DynamicCache

import pliant
from pico import FAMILIES, IDS, pico, tokenizer
from pico import SCANS as SCANS_ARE_FUNCTIONS
from pliant.anatomy import anatomy_of
from pliant.cli.show import show_inspection
from pliant.compat.cache_argument import cache_argument
from pliant.elastic import Subnet, cache_bytes, extract, macs, parameters, state_bytes, streamed_bytes
from pliant.measure.cost import COSTS, cost_of
from pliant.measure.speed.latency_table import Latency, measure_latency
from pliant.prune.moves import block_moves, pooled, width_moves

TEXT = pliant.text([" ".join(f"word {i * j % 17}" for j in range(1, 30)) for i in range(1, 40)])


@pytest.mark.parametrize("cost", [cost for cost in COSTS if cost not in ("prefill", "decode")])
def test_counted_costs_fall_with_every_removal(cost):
    model = pico("llama")
    anatomy = anatomy_of(model)
    of = cost_of(cost, model, anatomy)
    moves = pooled(block_moves(anatomy), width_moves(anatomy, {"channels": 8, "kv": 1}))
    assert all(of(move.subnet) < of(Subnet()) for move in moves(Subnet()))


SCANS = {  # elements of the state of a scan, and of its convolution, in one layer
    "mamba": (64 * 6, 64 * 4),
    "mamba2": (8 * 8 * 10, (64 + 2 * 2 * 10) * 4),
    "bamba": (12 * 8 * 10, (96 + 2 * 2 * 10) * 4),
}


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_costs_three_multiply_accumulates_per_element_of_its_state(name):
    model = pico(name)
    anatomy = anatomy_of(model)
    scans = [block for block in anatomy.blocks.values() if block.role == "scan"]
    scan, conv = SCANS[name]
    assert [(block.scan_state({}), block.conv_state({})) for block in scans] == [(scan, conv)] * len(scans)
    used = {"in_proj", "conv1d", "out_proj"} | ({"x_proj", "dt_proj"} if name == "mamba" else set())
    matrices = anatomy.head
    for path, parameter in model.named_parameters():
        attention_or_mlp = "self_attn" in path or "feed_forward" in path
        if path.endswith(".weight") and (attention_or_mlp or path.split(".")[-2] in used):
            matrices += parameter.numel()
    scores = sum(2 * 5 * 48 for block in anatomy.blocks.values() if block.role == "attention")
    assert macs(anatomy, tokens=2, context=5) == 2 * (matrices + scores + len(scans) * 3 * scan)
    assert state_bytes(anatomy, element=2) == len(scans) * (4 * scan + 2 * conv)
    read = 2 * sum(parameter.numel() for parameter in model.parameters())
    outside = anatomy.rest - anatomy.head
    streamed = streamed_bytes(anatomy, element=2, context=7)
    assert streamed == read - 2 * outside + 7 * cache_bytes(anatomy, element=2) + 2 * state_bytes(anatomy, element=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "bamba", "nemotron_h", "lfm2"])
def test_the_states_of_a_narrowed_model_take_the_bytes_that_are_counted(name, dtype):
    if name == "nemotron_h" and not SCANS_ARE_FUNCTIONS:
        pytest.skip("transformers 5.14 has no cache for layers with an MLP alone")
    model = pico(name)
    anatomy = anatomy_of(model)
    subnet = Subnet()
    for index, axis in enumerate(anatomy.axes.values()):
        if axis.leader in ("state", "scan", "channels") and index % 2:
            subnet = subnet.keeping(axis.name, axis.size // 2)
    extract(model, anatomy, subnet)
    model.to(dtype)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=IDS[:1], **cache_argument(model, cache), use_cache=True)
    held = 0
    for layer in cache.layers:
        for kind in ("conv_states", "recurrent_states"):
            held += sum(state.nbytes for state in vars(layer).get(kind, {}).values() if state is not None)
    assert held == state_bytes(anatomy, subnet, element=dtype.itemsize) > 0
    assert pliant.inspect(model, self_check=False)["state_bytes"] == held


@pytest.mark.parametrize(
    "name", [name for name in ("qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear") if name in FAMILIES]
)
def test_a_delta_rule_reads_its_state_once_more(name):
    anatomy = anatomy_of(pico(name))
    block = next(block for block in anatomy.blocks.values() if block.scan_state({}))
    without = macs(anatomy, Subnet().without(block.name), context=0)
    multiplied = [weight for weight in block.weights if weight.reads is not None or weight.depthwise]
    matrices = sum(prod(block.shape(weight, {})) for weight in multiplied)
    assert macs(anatomy, context=0) - without == matrices + 4 * block.scan_state({})


def test_an_inspection_shows_the_state_of_a_sequence(capsys):
    show_inspection(pliant.inspect(pico("mamba2"), self_check=False))
    assert "16 KiB of state for a sequence" in " ".join(capsys.readouterr().out.split())
    show_inspection(pliant.inspect(pico("llama"), self_check=False))
    assert "of state" not in capsys.readouterr().out


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_without_a_state_costs_nothing(name):
    anatomy = anatomy_of(pico(name))
    block = next(block for block in anatomy.blocks.values() if block.role == "scan")
    subnet = Subnet().keeping(f"{block.name}.state", 0)
    assert block.scan_state(subnet.kept(block)) == 0
    saved = 3 * SCANS[name][0]
    weights = parameters(anatomy) - parameters(anatomy, subnet)
    kept = sum(
        weight.path.endswith((".bias", "_bias", "A_log")) * prod(block.shape(weight, {})) for weight in block.weights
    )
    kept -= sum(
        weight.path.endswith((".bias", "_bias", "A_log")) * prod(block.shape(weight, subnet.kept(block)))
        for weight in block.weights
    )
    assert macs(anatomy, context=0) - macs(anatomy, subnet, context=0) == saved + weights - kept
    conv = block.conv_state({}) - block.conv_state(subnet.kept(block))
    assert state_bytes(anatomy, element=2) - state_bytes(anatomy, subnet, element=2) == 4 * saved // 3 + 2 * conv
    of = cost_of("bytes", pico(name), anatomy)
    assert of(Subnet()) - of(subnet) == 4 * weights + 2 * (4 * saved // 3 + 4 * conv)


def test_a_latency_table_adds_up_interpolates_and_survives_json():
    anatomy = anatomy_of(pico("llama"))
    axes = {("attention", "kv"): ((0.0, 0.0), (1.0, 1.0)), ("mlp", "channels"): ((0.0, 0.0), (0.5, 0.75), (1.0, 1.0))}
    table = Latency("decode", 2.0, {"attention": 1.0, "mlp": 4.0}, axes)
    assert table.of(anatomy) == pytest.approx(2 + 4 * 5)
    assert table.of(anatomy, Subnet().without("layers.0.mlp")) == pytest.approx(18)
    assert table.of(anatomy, Subnet().keeping("layers.0.mlp.channels", 36)) == pytest.approx(22 - 4 * 0.125)
    assert table.of(anatomy, Subnet().keeping("layers.0.attention.kv", 1)) == pytest.approx(22 - 2 / 3)
    assert Latency.from_dict(table.to_dict()) == table


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_measured_table_is_positive_and_leaves_the_model_alone(phase):
    model = pico("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = measure_latency(model, anatomy_of(model), phase, repeats=1)
    assert table.of(anatomy_of(model)) > 0
    assert all(0 <= y0 <= y1 <= 1 for points in table.axes.values() for (_, y0), (_, y1) in pairwise(points))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_measured_milliseconds_are_kept_for_a_search_that_goes_on(tmp_path):
    def pruned(step, work):
        return pliant.apply(pico("llama"), step, TEXT, tokenizer=tokenizer(), work=work, progress=False).pliant_history[
            0
        ]

    step = pliant.UnifiedPruner(ratio=0.15, samples=4, seqlen=64, mlp_group=8, per="decode")
    first = pruned(step, tmp_path)
    assert (tmp_path / "1-unified" / "latency-decode.json").exists()
    again = pruned(step, tmp_path)
    assert again["subnet"] == first["subnet"]
    assert all(counters["evaluations"] == 0 for counters in again["counters"].values())


def test_milliseconds_of_another_model_are_measured_again(tmp_path):
    path = tmp_path / "latency-decode.json"
    small, large = pico("llama"), pico("llama", seed=1, intermediate_size=96)
    cost_of("decode", small, anatomy_of(small), path)
    kept = path.read_text()
    cost_of("decode", small, anatomy_of(small), path)
    assert path.read_text() == kept
    cost_of("decode", large, anatomy_of(large), path)
    assert path.read_text() != kept
    path.write_text(path.read_text()[:50])
    cost_of("decode", large, anatomy_of(large), path)
    assert Latency.from_dict(json.loads(path.read_text())).phase == "decode"


def test_a_model_of_few_positions_is_timed_on_as_many():
    model = pico("gpt2", n_positions=32)
    seen = set()
    model.transformer.wte.register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape)))
    measure_latency(model, anatomy_of(model), "prefill", repeats=1)
    assert seen == {(1, 32)}


# --- predicted against measured
# ---------------------------------------------------------------------------------------------

CLOCK = {"rest": 3.0, "attention": 2.0, "mlp": 5.0}  # milliseconds of a whole block, and of all else


def on_a_clock(model, monkeypatch):
    """Let every layer of a model take the milliseconds of what is there of it."""
    spent = [0.0]

    def took(kind, share):
        return lambda *_: spent.__setitem__(0, spent[0] + CLOCK[kind] * share())

    for layer in model.model.layers:
        up, k = layer.mlp.up_proj, layer.self_attn.k_proj
        layer.mlp.register_forward_hook(took("mlp", lambda up=up: (len(up.weight) / 48) ** 2))
        layer.self_attn.register_forward_hook(took("attention", lambda k=k: len(k.weight) / 24))

    def milliseconds(model, ids):
        spent[0] = CLOCK["rest"]
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        return spent[0]

    monkeypatch.setattr("pliant.measure.speed.latency_table._milliseconds", milliseconds)
    return milliseconds


def test_what_the_table_predicts_is_what_is_measured(monkeypatch):
    """Of sub-networks that were not timed for it; where time goes with the square of a width, what lies between two
    timed widths is nearly right."""
    model = pico("llama")
    anatomy = anatomy_of(model)
    measure = on_a_clock(model, monkeypatch)
    table = measure_latency(model, anatomy, "prefill", repeats=1)
    assert table.rest == pytest.approx(CLOCK["rest"])
    assert table.blocks == {kind: pytest.approx(CLOCK[kind]) for kind in ("attention", "mlp")}
    ids = torch.zeros(1, 8, dtype=torch.long)
    draw = random.Random(0)
    apart = []
    for _ in range(12):
        subnet = Subnet()
        for block in anatomy.blocks.values():
            if block.name != "layers.0.attention" and draw.random() < 0.3:
                subnet = subnet.without(block.name)
            else:
                (axis,) = block.leaders
                subnet = subnet.keeping(axis.name, draw.randint(1, axis.size))
        with pliant.activate(model, subnet):
            measured = measure(model, ids)
        apart.append(abs(table.of(anatomy, subnet) / measured - 1))
        by_attention = sum(
            2.0 * dict(subnet.keep)[f"layers.{layer}.attention.kv"] / 3
            for layer in range(4)
            if f"layers.{layer}.attention" not in subnet.skip
        )
        without_mlps = subnet.without(*(f"layers.{layer}.mlp" for layer in range(4)))
        assert table.of(anatomy, without_mlps) == pytest.approx(3 + by_attention)  # linear, so exactly right
    assert max(apart) < 0.05
    assert table.of(anatomy, Subnet().keeping("layers.1.mlp.channels", 24)) == pytest.approx(3 + 4 * 7 - 5 * 0.75)
