"""A ResNet for CIFAR-10 without its smallest channels: accuracy, parameters, MACs and time of one image, before and
after.

Nothing is trained afterwards. The checkpoints are those of github.com/akamaster/pytorch_resnet_cifar10; the images a
.npz of JPEG files (``jpeg``: their bytes in a row, ``offset``: where each begins, ``label``).

python benchmarks/channels.py resnet56-4bfd9763.th cifar10-test-10000.npz --depth 56   (needs pillow)
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import pliant
from machine import save
from pliant.elastic import macs, parameters

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions; where it changes the number of channels, its shortcut pads them with zeros."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2."""

    def __init__(self, depth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (before, after, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), 1):
            rest = [Block(after, after, 1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{number}", nn.Sequential(Block(before, after, stride), *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def read(path: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, shape ``(count, 3, 32, 32)``, scaled as in training, and their labels."""
    with np.load(path) as file:
        data, starts, labels = file["jpeg"].tobytes(), file["offset"][: count + 1], file["label"][:count]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in pairwise(starts)])
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return scaled.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype("int64"))


@torch.inference_mode()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return right / len(labels)


@torch.inference_mode()
def milliseconds(models: list[nn.Module], images: torch.Tensor, rounds: int) -> list[list[float]]:
    """Milliseconds per image, for each model and round; the models take turns."""
    spent: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, times in zip(models, spent, strict=True):
            began = time.perf_counter()
            model(images)
            if number:  # the first round warms up
                times.append(1000 * (time.perf_counter() - began) / len(images))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--allocation", default="global")
    parser.add_argument("--group", type=int, default=1)
    given = parser.parse_args()

    dense = CifarResNet(given.depth)
    state = torch.load(given.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    dense.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    dense.eval()
    images, labels = read(given.images, given.count)
    models, ratios = [dense], [0.0, *given.ratios]
    for ratio in given.ratios:
        model = copy.deepcopy(dense)
        pliant.anatomy_of(model, example=images[:2])
        step = pliant.ChannelPruner(ratio=ratio, allocation=given.allocation, group=given.group)
        models.append(pliant.apply(model, step, progress=False))
    rows = []
    for ratio, model, times in zip(ratios, models, milliseconds(models, images[:64], 15), strict=True):
        anatomy = pliant.anatomy_of(model, example=images[:2])
        spread = dict(zip(("p10", "median", "p90"), np.percentile(times, [10, 50, 90]).tolist(), strict=True))
        rows.append(
            {
                "ratio": ratio,
                "parameters": parameters(anatomy),
                "macs": macs(anatomy),
                "accuracy": accuracy(model, images, labels),
                "milliseconds": spread,
            }
        )
        print(rows[-1])
    settings = {name: Path(value).name if isinstance(value, str) else value for name, value in vars(given).items()}
    save("channels", {"settings": {**settings, "threads": torch.get_num_threads(), "batch": 64}, "rows": rows})


if __name__ == "__main__":
    main()
