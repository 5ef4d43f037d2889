"""A module that transformers does not know, with state space blocks and an architecture file of its own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import pliant
from pliant.anatomy import anatomy_of
from pliant.architecture import known_families
from pliant.elastic import Subnet, extract, parameters
from pliant.errors import ArchitectureError, SubnetError
from pliant.measure.model_scorer import ModelScorer
from pliant.measure.scores.class_accuracy import ClassAccuracy
from pliant.prune.moves import block_moves
from pliant.searches.greedy import Greedy

LAYOUT = """
models: [PlainTagger]
layers: blocks
fixed: {hidden: 12, one: 1, kernel: 4, rank: 3}
axes:
  channels: {size: 12}
  state:    {size: 5, least: 0}
blocks:
  mamba:
    role: scan
    module: mixer
    norms: [norm]
    elementwise: [A_log]
    weights:
      in_proj: [[channels, channels], hidden]
      conv: [channels, one, kernel]
      x_proj: [[rank, state, state], channels]
      dt_proj: [channels, rank]
      A_log: [channels, state]
      D: [channels]
      out_proj: [hidden, channels]
"""
BYTES = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    """Mamba-1 that reads from the left and from the right."""

    def __init__(self, width=12, state=5, rank=3):
        super().__init__()
        self.rank = rank
        self.in_proj = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 4, groups=width)
        self.x_proj = nn.Linear(width, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.rand(width, state))
        self.D = nn.Parameter(torch.rand(width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        x, gate = self.in_proj(x).chunk(2, -1)
        x = functional.silu(self.conv(functional.pad(x.mT, (1, 2))).mT)
        state = self.A_log.shape[1]
        dt, b, c = self.x_proj(x).split([self.rank, state, state], -1)
        dt = functional.softplus(self.dt_proj(dt))
        y = self.scan(x, dt, b, c) + self.scan(x.flip(1), dt.flip(1), b.flip(1), c.flip(1)).flip(1)
        return self.out_proj((y + x * self.D) * functional.silu(gate))

    def scan(self, x, dt, b, c):
        now = x.new_zeros(x.shape[0], *self.A_log.shape)
        outputs = []
        for t in range(x.shape[1]):
            now = now * (-dt[:, t, :, None] * self.A_log.exp()).exp() + (dt * x)[:, t, :, None] * b[:, t, None]
            outputs.append((now * c[:, t, None]).sum(-1))
        return torch.stack(outputs, 1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(12), Mixer()

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class PlainTagger(nn.Module):
    """A class for every byte."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(12, 7)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


CUTS = {
    "a block": Subnet().without("layers.0.mamba"),
    "every block": Subnet().without(*(f"layers.{i}.mamba" for i in range(4))),
    "channels": Subnet().keeping("layers.1.mamba.channels", 5),
    "state": Subnet().keeping("layers.3.mamba.state", 2),
    "every scan": Subnet(keep=tuple((f"layers.{i}.mamba.state", 0) for i in range(4))),
    "all of these": Subnet(
        frozenset({"layers.0.mamba"}), (("layers.1.mamba.channels", 5), ("layers.3.mamba.state", 0))
    ),
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(known_families, "_added", dict(known_families._added))
    (tmp_path / "tagger.yaml").write_text(LAYOUT, "utf-8")
    pliant.add_architecture(tmp_path / "tagger.yaml")
    return PlainTagger().eval()


def logits(model):
    with torch.inference_mode():
        return model(BYTES)


def test_the_file_is_found_by_the_class_and_proven_on_the_example(model):
    anatomy = anatomy_of(model, example=BYTES)
    pliant.check(model)
    assert {b.role for b in anatomy.blocks.values()} == {"scan"}
    assert len(anatomy.may_go()) == 4
    shown = pliant.inspect(model)
    assert shown["parameters"] == sum(p.numel() for p in model.parameters()) == parameters(anatomy)
    assert shown["blocks"][0]["axes"]["state"]["units"] == 5
    model.blocks[1].mixer.forward = lambda x: x * model.blocks[1].mixer.D  # channels are elements of the stream here
    with pytest.raises(ArchitectureError, match=r"tagger\.yaml is wrong for this model: reordering units changed"):
        pliant.check(model)


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_is_exact_activated_extracted_and_made_again_for_saved_tensors(kind, model):
    anatomy, dense = anatomy_of(model, example=BYTES), logits(model)
    with pliant.activate(model, CUTS[kind]):
        activated = logits(model)
    assert torch.equal(logits(model), dense)
    assert not torch.allclose(activated, dense, atol=1e-3)
    extract(model, anatomy, CUTS[kind])
    assert torch.allclose(logits(model), activated, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == parameters(anatomy, CUTS[kind])
    again = PlainTagger().eval()
    for parameter in again.parameters():
        nn.init.ones_(parameter)
    anatomy_of(again, example=BYTES)
    pliant.apply(again, pliant.Cut(subnet=CUTS[kind], order="stored"), progress=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_pruners_that_read_no_text_cut_it(model):
    anatomy_of(model, example=BYTES)
    before = sum(p.numel() for p in model.parameters())
    pliant.apply(model, pliant.ChannelPruner(ratio=0.3, group=1), progress=False)
    assert sum(p.numel() for p in model.parameters()) <= 0.7 * before
    assert logits(model).isfinite().all()
    assert set(pliant.importance(model)) == set(anatomy_of(model).axes)
    with pytest.raises(ArchitectureError, match="PlainTagger predicts no next tokens"):
        pliant.apply(model, pliant.BlockPruner(ratio=0.3), pliant.text(["some text " * 50]), progress=False)


def test_a_search_removes_blocks_by_a_score_of_the_examples(model):
    anatomy = anatomy_of(model, example=BYTES)
    accuracy = ClassAccuracy([(BYTES, logits(model).argmax(-1))])
    scorer = ModelScorer(model, anatomy, accuracy, lambda: None)
    search = Greedy(Subnet(), block_moves(anatomy), lambda subnet: len(subnet.skip) < 2, mode="naive")
    while not search.done:
        for candidate in search.ask():
            search.tell(candidate, [scorer.score(candidate)])
    scorer.close()
    losses = {}
    for block in anatomy.blocks:
        with pliant.activate(model, Subnet().without(block)):
            losses[block] = accuracy.loss(accuracy.measure(model)[0] / accuracy.measure(model)[1])
    assert search.taken[0][0].unit == min(losses, key=lambda block: losses[block])
    assert len(search.subnet.skip) == 2


def test_sizes_may_be_keys_of_the_config_of_the_module(model, tmp_path):
    layout = LAYOUT.replace("{hidden: 12,", "{hidden: width,").replace("{size: 12}", "{size: 2 * half}")
    (tmp_path / "other.yaml").write_text(layout.replace("PlainTagger", "tagger"), "utf-8")
    pliant.add_architecture(tmp_path / "other.yaml")
    model.config = SimpleNamespace(model_type="tagger", width=12, half=6)
    assert anatomy_of(model, example=BYTES).architecture.name == "other"
    pliant.check(model)
    model.config.width = 11
    with pytest.raises(ArchitectureError, match=r"in_proj.weight has shape \(24, 12\), but other.yaml describes"):
        anatomy_of(model)
    del model.config.width
    with pytest.raises(ArchitectureError, match="the config of this tagger model gives no whole number for 'width'"):
        anatomy_of(model)


def test_a_module_without_a_file_or_an_example_is_refused(model):
    with pytest.raises(ArchitectureError, match="the input of a PlainTagger is unknown; pass an example"):
        pliant.check(model)
    with pytest.raises(ArchitectureError, match="no architecture file that lists 'Linear' under 'models'"):
        anatomy_of(nn.Linear(3, 3))


def test_a_state_stays_where_the_file_does_not_let_it_go(model):
    known_families._added.clear()
    file = known_families.parse("tagger", known_families.yaml.safe_load(LAYOUT.replace(", least: 0", "")))
    known_families._added["PlainTagger"] = file
    anatomy_of(model, example=BYTES)
    with pytest.raises(SubnetError, match=r"layers\.0\.mamba\.state can keep 1 to 5 units, not 0"):
        pliant.apply(model, pliant.Cut(subnet=Subnet().keeping("layers.0.mamba.state", 0)), progress=False)
