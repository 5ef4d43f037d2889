"""Tiny convolutional networks, of transformers and of plain modules. Random weights, large enough to matter."""

from __future__ import annotations

import torch
import transformers
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pliant.elastic import Subnet

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Basic(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        changes = stride > 1 or before != after
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if changes else None
        )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Basic(8, 8, 1), Basic(8, 8, 1))
        self.layer2 = nn.Sequential(Basic(8, 12, 2), Basic(12, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Flat(nn.Module):
    """A classifier reads every pixel of every channel: flatten with height x width above 1."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 6, 5, 2), nn.PReLU(6), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveMaxPool2d((2, 3))),
        )
        self.classifier = nn.Sequential(nn.Linear(60, 16), nn.Tanh(), nn.Dropout(), nn.Linear(16, 5))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Dense(nn.Module):
    """Layers read all that came before, side by side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10), nn.BatchNorm2d(14 + 3)])
        self.convs = nn.ModuleList([nn.Conv2d(6, 4, 3, 1, 1), nn.Conv2d(10, 4, 3, 1, 1)])
        self.fc = nn.Linear(17, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        everything = torch.cat([*features, F.avg_pool2d(x, 2)], 1)  # what came in cannot be cut, what is beside it can
        return self.fc(F.relu(self.norms[-1](everything)).mean((2, 3)))


class Excite(nn.Module):
    """Squeeze-and-excitation in a block with a depthwise convolution that makes two channels of each."""

    def __init__(self, channels: int):
        super().__init__()
        self.expand = nn.Conv2d(channels, 12, 1)
        self.depthwise = nn.Conv2d(12, 24, 3, 1, 1, groups=12, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.squeeze = nn.Linear(24, 6)
        self.excite = nn.Linear(6, 24)
        self.project = nn.Conv2d(24, channels, 1)

    def forward(self, x):
        y = F.hardswish(self.bn(self.depthwise(self.expand(x))))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3)))))
        return x + self.project(y * torch.sigmoid(gate)[:, :, None, None])


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(Excite(8), Excite(8))
        self.narrow = nn.Conv2d(8, 4, 1)
        self.grouped = nn.Conv2d(4, 8, 3, 1, 1, groups=2)  # which of its channels meet depends on where they lie
        self.head = nn.Conv2d(8, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = self.narrow(self.blocks(self.stem(x)))
        return self.fc(F.relu(self.head(self.grouped(x))).amax((2, 3)))


class Shared(nn.Module):
    """One module, called twice: what goes in is what comes out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.twice = nn.Sequential(nn.Conv2d(8, 6, 3, 1, 1), nn.GroupNorm(1, 6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.twice(F.relu(self.twice(x)))
        x = self.norm(x.permute(0, 2, 3, 1)) * self.scale
        return self.fc(x.mean((1, 2)))


def _config(name: str):
    few = {"num_labels": 5}
    if name == "mobilenet_v2":
        return transformers.MobileNetV2Config(
            image_size=32, depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, expand_ratio=2.0, **few
        )
    if name == "convnext":
        return transformers.ConvNextConfig(image_size=32, hidden_sizes=[6, 10], depths=[2, 1], num_stages=2, **few)
    sizes = {"resnet_basic": (8, [8, 12]), "resnet_bottleneck": (8, [16, 24])}
    first, rest = sizes[name]
    layer = name.removeprefix("resnet_")
    return transformers.ResNetConfig(embedding_size=first, hidden_sizes=rest, depths=[2, 2], layer_type=layer, **few)


HUB = ("resnet_basic", "resnet_bottleneck", "mobilenet_v2", "convnext")
PLAIN = {"plain_resnet": PlainResNet, "flat": Flat, "dense": Dense, "excite": SqueezeExcite, "shared": Shared}
NETS = (*HUB, *PLAIN)


def net(name: str) -> nn.Module:
    """A network whose every weight and statistic differs from its neighbours."""
    torch.manual_seed(0)
    model = (
        transformers.AutoModelForImageClassification.from_config(_config(name)) if name in HUB else PLAIN[name]()
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(
                torch.randn_like(parameter) * (1.5 / fan_in) ** 0.5 if fan_in > 1 else 0.5 + torch.rand_like(parameter)
            )
        for name_, buffer in model.named_buffers():
            if buffer.dim():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name_.endswith("var") else -0.5))
    return model


def logits(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    """Logits of the images, shape ``(2, 5)``."""
    with torch.inference_mode():
        out = model(images)
    return out if isinstance(out, torch.Tensor) else out.logits


@st.composite
def subnets(draw, anatomy):
    """Any sub-network of a traced model."""
    subnet = Subnet()
    for block in anatomy.blocks.values():
        if block.removable and draw(st.booleans()):
            subnet = subnet.without(block.name)
    for block in anatomy.blocks.values():
        for axis in block.leaders if block.name not in subnet.skip else ():
            subnet = subnet.keeping(axis.name, draw(st.integers(1, axis.size)))
    return subnet
