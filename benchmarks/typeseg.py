"""A Mamba-1 classifier of bytes, typeseg, without its blocks, scans and channels: accuracy on files of this machine.

    pip download --no-deps typeseg
    python benchmarks/typeseg.py typeseg-0.2.7-py3-none-any.whl

Left out, the wheel is the installed package. The classifier reads both ways; its six blocks are built here as a
plain module, which ``typeseg.yaml`` describes to pliant. The files come from the Python installation: a window from the
middle of each, whose bytes should all get the type that the name of the file says. Binary files in hexadecimal, base64,
base32 and base85 are four more types. The result lists the files with their digests. ``--quick`` checks that all of it
runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import json
import os
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pliant
from machine import save
from pliant.anatomy import Anatomy, anatomy_of
from pliant.criteria import by_falling
from pliant.criteria.unit_readers import by_unit, readers
from pliant.elastic import Subnet, parameters, reorder
from pliant.measure.model_scorer import ModelScorer
from pliant.measure.scores.class_accuracy import ClassAccuracy
from pliant.prune.moves import Moves, block_moves
from pliant.searches.greedy import Greedy, Move
from typeseg_model import MambaSeg, Package

HERE = Path(__file__).parent
ENDINGS = {
    "python": (".py",),
    "c_family": (".h", ".c", ".cpp"),
    "json": (".json",),
    "yaml": (".yaml", ".yml"),
    "markdown": (".md",),
    "restructuredtext": (".rst",),
    "text": (".txt",),
    "csv": (".csv",),
    "svg": (".svg",),
    "css": (".css",),
    "html": (".html",),
    "javascript_typescript": (".js", ".mjs"),
    "xml": (".xml",),
    "shell": (".sh",),
}
BINARY = (".so", ".pyc", ".png", ".gz", ".whl", ".npz", ".exe")
ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "encoding_hex": lambda content: content.hex().encode(),
    "encoding_base64": base64.b64encode,
    "encoding_base32": base64.b32encode,
    "encoding_base85": base64.a85encode,
}
PROSE = ("license", "licence", "copying", "notice", "authors", "readme", "changes", "history")  # other .txt are lists
SMALLEST, LARGEST = 1 << 10, 1 << 20  # bytes of a file
FILES, CALIBRATION, WINDOW = 20, 4, 384  # files of a type, more for calibration, bytes of each
BATCH = 16  # windows in one pass
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the channels
ROUNDS = 5  # of the timing


@dataclass(frozen=True)
class Window:
    """A stretch of a file.

    Attributes:
        type: the type that the classifier should give to each byte.
        path: from the folder of the packages or of the standard library.
    """

    type: str
    path: str
    content: bytes

    def listed(self) -> list[str]:
        return [self.type, self.path, hashlib.sha256(self.content).hexdigest()[:16]]


def windows_of(count: int, length: int) -> Iterator[Window]:
    """Windows of up to ``count`` files of each type, in an order that depends on their paths alone: one file of every
    package, then a second one, and so on."""
    roots = {Path(sysconfig.get_path("stdlib"))} | {Path(path) for path in sys.path if path.endswith("-packages")}
    by_ending: dict[str, list[tuple[str, Path]]] = {}
    for root in sorted(roots):
        for folder, names, files in os.walk(root):
            names[:] = sorted(name for name in names if name != "site-packages")
            for name in files:
                path = Path(folder, name)
                by_ending.setdefault(path.suffix, []).append((path.relative_to(root).as_posix(), path))
    for kind, endings in {**ENDINGS, **dict.fromkeys(ENCODINGS, BINARY)}.items():
        seen: set[bytes] = set()
        for relative, path in _spread([file for ending in endings for file in by_ending.get(ending, [])]):
            content = _window(kind, path, length)
            if content is not None and content not in seen:
                seen.add(content)
                yield Window(kind, relative, content)
            if len(seen) == count:
                break


def _spread(files: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The first file of each package, by the digest of its path, then the second of each, and so on."""
    taken: Counter[str] = Counter()
    ranked = []
    for relative, path in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        package = relative.partition("/")[0]
        ranked.append((taken[package], len(ranked), relative, path))
        taken[package] += 1
    return [(relative, path) for _, _, relative, path in sorted(ranked, key=lambda file: file[:2])]


def _window(kind: str, path: Path, length: int) -> bytes | None:
    """The middle of a file, or of what encodes it; None if the file is unsuited."""
    if kind == "text" and not path.stem.lower().startswith(PROSE):
        return None
    try:
        if not SMALLEST <= path.stat().st_size <= LARGEST:
            return None
        content = path.read_bytes()
        if kind in ENCODINGS:
            content = ENCODINGS[kind](content)
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    begin = (len(content) - length) // 2
    return None if begin < 0 or b"\0" in content else content[begin : begin + length]


class Classifier:
    """The model, its anatomy, and the accuracy of its sub-networks, each measured once."""

    def __init__(self, model: MambaSeg, windows: Sequence[Window], types: Sequence[str]):
        self.model = model
        self.contents = torch.tensor([list(window.content) for window in windows])
        self.labels = torch.tensor([types.index(window.type) for window in windows])[:, None].expand_as(self.contents)
        self.kinds = [window.type for window in windows]
        pliant.add_architecture(HERE / "typeseg.yaml")
        self.anatomy = anatomy_of(model, example=self.contents[:1, :64])
        pliant.check(model)
        self.score = ClassAccuracy(list(zip(self.contents.split(BATCH), self.labels.split(BATCH), strict=True)))
        self._scorer = ModelScorer(model, self.anatomy, self.score, lambda: None)
        self._known: dict[Subnet, float] = {}

    def accuracy(self, subnet: Subnet) -> float:
        """Share of the bytes that get the right type."""
        if subnet not in self._known:
            self._known[subnet] = self.score.shown(self._scorer.score(subnet))
            self._scorer.close()
            print(f"{self._known[subnet]:.4f}  {1 - self.removed(subnet):.3f} of the parameters", flush=True)
        return self._known[subnet]

    def removed(self, subnet: Subnet) -> float:
        """Share of the parameters that a sub-network lacks."""
        return 1 - parameters(self.anatomy, subnet) / parameters(self.anatomy)

    def point(self, subnet: Subnet) -> dict[str, Any]:
        return {"accuracy": self.accuracy(subnet), "parameters_removed": self.removed(subnet)}

    @torch.inference_mode()
    def by_type(self) -> dict[str, dict[str, float]]:
        """Files of each type, and the share of their bytes that get it."""
        right = torch.cat([self.model(part).argmax(-1) for part in self.contents.split(BATCH)]) == self.labels
        shares = right.float().mean(1)
        return {
            kind: {"files": self.kinds.count(kind), "accuracy": float(shares[[k == kind for k in self.kinds]].mean())}
            for kind in dict.fromkeys(self.kinds)
        }


def scan_moves(anatomy: Anatomy) -> Moves:
    """Remove the scan of a layer: its state, and the time steps that only the scan reads."""

    def without(subnet: Subnet, block: str) -> Subnet:
        return subnet.keeping(f"{block}.state", 0).keeping(f"{block}.rank", 0)

    return lambda subnet: [
        Move(f"scan of {block}", without(subnet, block))
        for block in anatomy.blocks
        if dict(subnet.keep).get(f"{block}.state") != 0
    ]


def removals(classifier: Classifier, moves: Moves) -> dict[str, Any]:
    """Every single removal, and the greedy order in which all are removed."""
    single = {move.unit: classifier.point(move.subnet) for move in moves(Subnet())}
    greedy = Greedy(Subnet(), moves, lambda subnet: bool(moves(subnet)), mode="naive")
    while not greedy.done:
        for candidate in greedy.ask():
            greedy.tell(candidate, [-classifier.accuracy(candidate)])
    return {
        "single": single,
        "greedy": [{"unit": move.unit, **classifier.point(move.subnet)} for move, _ in greedy.taken],
    }


def contributions(model: MambaSeg, anatomy: Anatomy, contents: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each channel adds to the stream: the root mean square of its values times the norm of the column that reads
    it. Axis name -> shape ``(channels,)``."""
    squares: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
            squared = args[0].double().square().sum((0, 1))
            squares[name] = squares[name] + squared if name in squares else squared

        return hook

    watched = [(block, weight) for block, weight in readers(anatomy) if weight.path.endswith("out_proj.weight")]
    handles = [
        model.layers[block.layer]
        .get_submodule(weight.path.rpartition(".")[0])
        .register_forward_pre_hook(record(block.name))
        for block, weight in watched
    ]
    with torch.inference_mode():
        for part in contents.split(BATCH):
            model(part)
    for handle in handles:
        handle.remove()
    sizes = {}
    for block, weight in watched:
        columns = weight.tensor(model.layers[block.layer]).detach().double().square().sum(0)
        for axis, per_unit in by_unit(block, weight, (squares[block.name] * columns).sqrt()):
            sizes[axis.name] = per_unit
    return sizes


def channels(classifier: Classifier, calibration: torch.Tensor) -> dict[str, list[dict[str, Any]]]:
    """The same share of the channels removed in every block, in two orders."""
    anatomy = classifier.anatomy
    names = [axis for axis in anatomy.axes if axis.endswith(".channels")]
    importances = {
        "l1": {name: pliant.importance(classifier.model)[name] for name in names},
        "activation": contributions(classifier.model, anatomy, calibration),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for order, sizes in importances.items():
        orders = by_falling(sizes, anatomy)
        reorder(classifier.model, anatomy, orders)
        classifier._known.clear()
        found[order] = []
        for share in SHARES:
            kept = {name: round(anatomy.axes[name].size * (1 - share)) for name in names}
            found[order].append({"share": share, **classifier.point(Subnet(keep=tuple(sorted(kept.items()))))})
        reorder(classifier.model, anatomy, {name: torch.argsort(order) for name, order in orders.items()})
    classifier._known.clear()
    return found


def speed(classifier: Classifier, subnets: Mapping[str, Subnet], rounds: int) -> dict[str, Any]:
    """Milliseconds of a pass over one batch by models that were cut for good, in turn with the dense one: the medians,
    and those of the ratios in a round."""
    models = {"dense": classifier.model}
    for name, subnet in subnets.items():
        models[name] = copy.deepcopy(classifier.model)
        anatomy_of(models[name], example=classifier.contents[:1, :64])
        pliant.apply(models[name], pliant.Cut(subnet=subnet, order="stored"), progress=False)
    batch = classifier.contents[:BATCH]
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model(batch)
                if turn:  # the first warms up
                    taken[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: {
            "milliseconds": statistics.median(times),
            "speedup": statistics.median(d / t for d, t in zip(taken["dense"], times, strict=True)),
            "parameters_removed": classifier.removed(subnets.get(name, Subnet())),
        }
        for name, times in taken.items()
    }


def run(wheel: Path | None, quick: bool) -> None:
    began = time.monotonic()
    package = Package.at(wheel)
    types = package.manifest["labels"]
    count, more, length = (2, 1, 96) if quick else (FILES, CALIBRATION, WINDOW)
    drawn = list(windows_of(count + more, length))
    order: Counter[str] = Counter()
    windows, calibration = [], []
    for window in drawn:
        (windows if order[window.type] < count else calibration).append(window)
        order[window.type] += 1
    print(f"{len(windows)} files of {len(order)} types: {dict(order)}")
    if not quick and (len(windows) < 200 or len(order) < 10):
        sys.exit("this Python installation has fewer than 200 files of 10 types; install more packages")
    classifier = Classifier(package.model(), windows, types)
    anatomy = classifier.anatomy
    blocks = [*anatomy.blocks]
    cut = {
        "half of the scans": [f"{block}.{axis}" for block in blocks[::2] for axis in ("state", "rank")],
        "all scans": [f"{block}.{axis}" for block in blocks for axis in ("state", "rank")],
    }
    subnets = {name: Subnet(keep=tuple(sorted((axis, 0) for axis in axes))) for name, axes in cut.items()}
    subnets["one block"] = Subnet().without(blocks[0])
    subnets["half of the channels"] = Subnet(
        keep=tuple(sorted((name, axis.size // 2) for name, axis in anatomy.axes.items() if name.endswith("channels")))
    )
    result = {
        "difference_from_the_package": package.difference(classifier.model, classifier.contents[0]),
        "parameters": parameters(anatomy),
        "bytes_of_a_file": length,
        "dense": {**classifier.point(Subnet()), "by_type": classifier.by_type()},
        "blocks": removals(classifier, block_moves(anatomy)),
        "scans": removals(classifier, scan_moves(anatomy)),
        "channels": channels(classifier, torch.tensor([list(window.content) for window in calibration])),
        "speed": {"threads": torch.get_num_threads(), **speed(classifier, subnets, 1 if quick else ROUNDS)},
        "seconds": time.monotonic() - began,
        "files": [window.listed() for window in windows],
        "calibration_files": [window.listed() for window in calibration],
    }
    assert result["difference_from_the_package"] < 1e-4, result["difference_from_the_package"]
    print(json.dumps({key: value for key, value in result.items() if "files" not in key}, indent=1))
    if not quick:
        save("typeseg", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="default: the installed package")
    parser.add_argument("--quick", action="store_true", help="few short windows; nothing is written")
    options = parser.parse_args()
    run(options.wheel, options.quick)
