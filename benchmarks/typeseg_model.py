"""typeseg's classifier of bytes as a plain module, with the weights of its package: Mamba-1 that reads both ways."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import functional

CHUNK = 4  # bytes whose decays are computed at once: few enough that they stay in the cache of a core


class Mixer(nn.Module):
    """The mixer of a Mamba-1 block that reads from both ends.

    Arguments:
        width: of the stream and of the channels.
        state, rank, kernel: elements of a channel's state, rank of the time steps, bytes that the convolution sees.
    """

    def __init__(self, width: int, state: int, rank: int, kernel: int):
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, kernel, groups=width)
        self.x_proj = nn.Linear(width, rank + 2 * state)
        self.dt_proj = nn.Linear(rank, width)
        self.out_proj = nn.Linear(width, width)
        self.A_log = nn.Parameter(torch.empty(width, state))
        self.D = nn.Parameter(torch.empty(width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Arguments: hidden_states: shape ``(windows, bytes, hidden)``."""
        x, gate = self.in_proj(hidden_states).chunk(2, -1)
        kernel = self.conv.weight.shape[-1]
        before = (kernel - 1) // 2
        x = functional.silu(self.conv(functional.pad(x.mT, (before, kernel - 1 - before))).mT)
        y = 2 * self.D * x  # once in each direction
        state = self.A_log.shape[1]
        if state:
            steps, b, c = self.x_proj(x).split([self.dt_proj.in_features, state, state], -1)
            steps = functional.softplus(self.dt_proj(steps)) + 1e-4
            x, steps, b, c = (torch.cat([part, part.flip(1)]).transpose(0, 1).contiguous() for part in (x, steps, b, c))
            forwards, backwards = scan(x, steps, b, c, -self.A_log.exp()).transpose(0, 1).chunk(2)
            y = y + forwards + backwards.flip(1)
        return self.out_proj(y * functional.silu(gate))


def scan(x: torch.Tensor, steps: torch.Tensor, b: torch.Tensor, c: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The selective scan of Mamba-1 (Gu and Dao, 2023, section 3.2).

    Arguments:
        x, steps: shape ``(bytes, windows, channels)``.
        b, c: shape ``(bytes, windows, state)``.
        decay: shape ``(channels, state)``.
    """
    outputs, state = [], x.new_zeros(x.shape[1], *decay.shape)
    for begin in range(0, len(x), CHUNK):
        part = slice(begin, begin + CHUNK)
        kept = (steps[part, :, :, None] * decay).exp_()
        states = (steps[part] * x[part]).unsqueeze(-1) * b[part].unsqueeze(2)
        for now, share in zip(states, kept, strict=True):
            state = now.addcmul_(share, state)
        outputs.append((states @ c[part].unsqueeze(-1)).squeeze(-1))
    return torch.cat(outputs)


class Layer(nn.Module):
    def __init__(self, width: int, state: int, rank: int, kernel: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mixer = Mixer(width, state, rank, kernel)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mixer(self.norm(hidden_states))


class MambaSeg(nn.Module):
    """typeseg's classifier: a type for every byte."""

    def __init__(self, depth: int, width: int, state: int, rank: int, kernel: int, tokens: int, types: int):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(Layer(width, state, rank, kernel) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, types)

    def forward(self, content: torch.Tensor) -> torch.Tensor:
        """Arguments: content: bytes, shape ``(windows, bytes)``; all that are not ASCII are one token."""
        hidden_states = self.embedding(content.clamp(max=128))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.head(self.norm(hidden_states))


@dataclass(frozen=True)
class Package:
    """The files of typeseg: its weights, the names of the types, and the source of its own kernel."""

    weights: Mapping[str, numpy.ndarray]
    manifest: dict[str, Any]
    kernel: str

    @classmethod
    def at(cls, wheel: Path | None) -> Package:
        """The package in a wheel, or else the installed one."""
        if wheel is not None:
            root: Any = zipfile.Path(wheel) / "typeseg"
        else:
            try:
                root = Path(str(metadata.distribution("typeseg").locate_file("typeseg")))
            except metadata.PackageNotFoundError:
                sys.exit("typeseg is not installed; give the path of its wheel (pip download --no-deps typeseg)")
        manifest = json.loads((root / "data" / "manifest.json").read_text("utf-8"))
        with (root / "data" / manifest["mamba"]["file"]).open("rb") as file, numpy.load(file) as stored:
            weights = {name: stored[name] for name in stored.files}
        return cls(weights, manifest, (root / "_mamba_kernel.py").read_text("utf-8"))

    def model(self) -> MambaSeg:
        """The classifier with its trained weights."""
        sizes = self.manifest["mamba"]
        tokens, width = self.weights["Embed_0__embedding"].shape
        model = MambaSeg(
            sizes["n_layers"],
            width,
            sizes["d_state"],
            sizes["dt_rank"],
            sizes["d_conv"],
            tokens,
            self.manifest["num_classes"],
        )
        model.load_state_dict({self._path(name): self._tensor(name) for name in self.weights})
        return model.eval()

    @staticmethod
    def _path(name: str) -> str:
        """``CheckpointMambaBlock1D_3__Dense_0__kernel`` -> ``layers.3.mixer.in_proj.weight``."""
        owner, *rest = name.split("__")
        if "Block" not in owner:
            outside = {"Embed_0": "embedding", "LayerNorm_0": "norm", "Dense_0": "head"}
            return f"{outside[owner]}.{'bias' if rest[-1] == 'bias' else 'weight'}"
        layer = f"layers.{owner.rpartition('_')[2]}"
        if rest[0] == "LayerNorm_0":
            return f"{layer}.norm.{'bias' if rest[1] == 'bias' else 'weight'}"
        if len(rest) == 1:
            return f"{layer}.mixer.{rest[0]}"
        inside = {"Dense_0": "in_proj", "Dense_1": "x_proj", "Dense_2": "dt_proj", "Dense_3": "out_proj"}
        return f"{layer}.mixer.{inside.get(rest[0], 'conv')}.{'bias' if rest[1] == 'bias' else 'weight'}"

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = torch.from_numpy(self.weights[name]).float()
        if not name.endswith("__kernel"):
            return tensor
        return tensor.permute(2, 1, 0).contiguous() if tensor.dim() == 3 else tensor.T.contiguous()

    def difference(self, model: MambaSeg, content: torch.Tensor) -> float:
        """The largest difference between the logits of this module and those of the package's own kernel.

        Arguments:
            content: bytes of one window, shape ``(bytes,)``.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.py")
            path.write_text(self.kernel, "utf-8")
            spec = importlib.util.spec_from_file_location("kernel", path)
            assert spec is not None
            assert spec.loader is not None
            kernel = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kernel)
        sizes = self.manifest["mamba"]
        weights = {name.replace("__", "/"): tensor for name, tensor in self.weights.items()}
        expected = kernel.mamba_forward(
            numpy,
            weights,
            content.numpy(),
            n_layers=sizes["n_layers"],
            d_state=sizes["d_state"],
            dt_rank=sizes["dt_rank"],
            d_conv=sizes["d_conv"],
        )
        with torch.inference_mode():
            return float((model(content[None])[0] - torch.from_numpy(expected)).abs().max())
