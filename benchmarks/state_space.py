"""What can be removed from a state-space model or a hybrid: sensitivity, curves, recovery and speed.

    python benchmarks/state_space.py --model DIR --calibration FILE --held-out FILE ... [--tasks FILE ...] [PART ...]

PART is sensitivity, curves, recover or speed; default: all, in this order. Rows of results/state_space.json carry the
name of the model folder; a measurement that is there is not made again. Scores of a search are kept in --work, so that
a search goes on where it stopped. `report_state_space.py` prints the tables.

The hybrid of docs/state-space.md is SmolLM2-135M with 20 of its attentions replaced by Mamba-2 mixers, in an ordinary
folder of transformers. The pure Mamba-2 model comes from train_mamba2.py. It is small, so that more windows can be
used: `--samples 96 --curve-windows 64 --seeds 0 1 2 --minutes 5 --method full`. `pliant demo` leaves calibration text
and held-out text in build/demo/parts. The estimate of every part is printed first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pliant
from machine import RESULTS, machine, save
from pliant.anatomy import anatomy_of
from pliant.checkpoint.load import tokenizer_of
from pliant.elastic import Subnet, macs, parameters, streamed_bytes
from pliant.elastic import ratio as ratio_of
from pliant.forward.windows import windows_for
from pliant.measure.prefix_scorer import PrefixScorer
from pliant.progress import Console, Progress
from pliant.prune.known_subnet import extract_and_verify
from pliant.prune.repair import repair
from pliant.prune.scan_skip import scan_axis
from pliant.prune.unit_order import ordered
from pliant.step import Job, Step
from state_space_units import CHANNELS, MILLISECONDS, ONE_SHOT, TOGETHER, in_one_shot, in_random_order, kinds_of

PARTS = ("sensitivity", "curves", "recover", "speed")
SEQLEN, SEED, ORDER = 256, 42, "activation"
SEARCH = {"refresh": 0, "slack": 0.2}  # fewer scores than by default, for the two hours that all of this may take
REFIT = 24  # rows of calibration text
RECOVERY = {"batch_size": 4, "seqlen": SEQLEN, "held_out": 16, "eval_steps": 32}


class Bench:
    """One model, its texts, and the rows that are there."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.name = arguments, Path(arguments.model).name
        self.calibration = pliant.text(arguments.calibration)
        self.work = Path(arguments.work) / self.name
        self.path = RESULTS / "state_space.json"
        model = self.model()
        self.tokenizer, self.anatomy = tokenizer_of(model), anatomy_of(model)
        rows = self.calibration.sample(arguments.samples, SEED)
        self.windows = windows_for(model, self.tokenizer, rows, SEQLEN)
        blocks = self.anatomy.blocks.values()
        states = [axis.size for block in blocks if (axis := scan_axis(block))]
        channels = [axis.size for block in blocks if block.role == "mlp" for axis in block.leaders]
        self.groups = {"state_group": max(states) // 2, "mlp_group": max(channels, default=4) // 4}
        self.kinds = kinds_of(self.anatomy, self.groups)
        measured = {name: getattr(arguments, name) for name in ("samples", "curve_windows", "windows", "questions")}
        self.measured = {**measured, "calibration": self.calibration.source, "calibration_windows": len(self.windows)}
        if any(row["model"] == self.name and row["settings"] != self.measured for row in self.rows()):
            raise SystemExit(f"{self.path} has rows of {self.name} with other settings; delete them or give the same")

    def model(self) -> Any:
        return pliant.load(self.arguments.model, dtype="float32")

    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def done(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(row["key"]): row for row in self.rows() if row["model"] == self.name}

    def row(self, *key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a measurement, which is made if it is not there yet."""
        if (row := self.done().get(key)) is None:
            print(f"{time.strftime('%H:%M:%S')} {self.name}: {' '.join(map(str, key))}", flush=True)
            began = time.monotonic()
            row = {"model": self.name, "key": list(key), **make()}
            row |= {"settings": self.measured, "seconds": round(time.monotonic() - began, 1)}
            row |= {"commit": machine()["commit"], "threads": torch.get_num_threads()}
            save("state_space", {"rows": [*self.rows(), row]})
        return row

    def job(self, model: Any) -> Job:
        return Job(model, lambda: self.tokenizer, lambda: model, self.calibration, None, Progress())

    def quality(self, model: Any, windows: int, tasks: bool = False) -> dict[str, Any]:
        """Perplexity on every held-out text, and accuracy if asked for, with the figures of every item."""
        result = pliant.evaluate(
            model,
            perplexity=self.arguments.held_out,
            tasks=self.arguments.tasks if tasks else (),
            tokenizer=self.tokenizer,
            seqlen=SEQLEN,
            windows=windows,
            limit=self.arguments.questions,
            items=True,
        )
        for row in result["perplexity"].values():
            row["items"]["loss"] = [round(loss, 4) for loss in row["items"]["loss"]]
        for row in result["tasks"].values():
            row["items"] = {key: v if key == "digest" else "".join(map(str, v)) for key, v in row["items"].items()}
        return result

    def loss_increases(self, kind: str) -> dict[str, Any]:
        """Loss increase of every first move of a kind on the calibration windows."""
        model = self.model()
        with ordered(self.job(model), self.anatomy, ORDER, self.windows):
            scorer = PrefixScorer(model, self.anatomy, self.windows)
            dense = scorer.score(Subnet())
            units = {}
            for move in self.kinds[kind].moves(Subnet()):
                saved = parameters(self.anatomy) - parameters(self.anatomy, move.subnet)
                units[move.unit] = {"loss": scorer.score(move.subnet) - dense, "parameters": saved}
            scorer.close()
        return {"dense": dense, "units": units}

    def everywhere(self) -> dict[str, Any]:
        """Loss increase if the state of every scan is narrowed alike, the least important units first or last."""
        rows: dict[str, Any] = {}
        for order in (ORDER, "stored"):
            model = self.model()
            axes = [axis for block in self.anatomy.blocks.values() if (axis := scan_axis(block))]
            with ordered(self.job(model), self.anatomy, order, self.windows):
                scorer = PrefixScorer(model, self.anatomy, self.windows)
                dense = scorer.score(Subnet())
                for quarters in (3, 2, 1, 0):
                    subnet = Subnet()
                    for axis in axes:
                        subnet = subnet.keeping(axis.name, axis.size * quarters // 4)
                    rows[f"{order}, {quarters}/4"] = scorer.score(subnet) - dense
                scorer.close()
        return {"dense": dense, "units": rows}

    def shedder(self, kind: str, asked: float, refit: int) -> Step:
        by = "decode" if kind == MILLISECONDS else "parameters"
        return pliant.MambaShedder(
            target=self.kinds[kind].target,
            ratio=asked,
            ratio_of=by,
            per=by,
            samples=self.arguments.samples,
            seqlen=SEQLEN,
            seed=SEED,
            order=ORDER,
            repair=refit,
            **SEARCH,
            **self.groups,
        )

    def baseline(self, kind: str, method: str, asked: float) -> Subnet:
        """What random order or the one-shot ranking keeps."""
        if method != ONE_SHOT:
            return in_random_order(self.anatomy, self.kinds[kind].moves, asked, method)
        known = {}
        for part in self.single() if kind == TOGETHER else [kind]:
            known |= self.sensitivity(part)["units"]
        return in_one_shot(self.anatomy, self.kinds[kind].moves, asked, known)

    def single(self) -> list[str]:
        """The kinds that are not pools of others."""
        return [kind for kind in self.kinds if kind not in (TOGETHER, MILLISECONDS)]

    def cut(self, kind: str, method: str, asked: float, form: str) -> tuple[Any, dict[str, Any]]:
        """A cut model, and what a row says of the cut."""
        model = self.model()
        if method == "greedy":
            step = self.shedder(kind, asked, REFIT if form == "refitted" else 0)
            given = {"tokenizer": self.tokenizer, "work": self.work / kind}
            pliant.apply(model, step, self.calibration, **given, progress=Console())
            record = model.pliant_history[-1]
            subnet, points = Subnet.from_dict(record["subnet"]), record["points"]
            row = {"path": [point["unit"] for point in points], "calibration_loss": points[-1]["loss"]}
            row["counters"] = record["counters"]
        else:
            subnet, row = self.baseline(kind, method, asked), {}
            job = self.job(model)
            with ordered(job, self.anatomy, ORDER, self.windows):
                if form == "refitted":
                    rows = self.calibration.sample(REFIT, SEED + 2)
                    windows = windows_for(model, self.tokenizer, rows, SEQLEN)
                    repair(model, self.anatomy, subnet, windows, 1.0, Progress())
                extract_and_verify(model, self.anatomy, subnet)
        row |= {"subnet": subnet.to_dict(), "ratio": ratio_of(self.anatomy, subnet)}
        return model, row

    def sensitivity(self, kind: str) -> dict[str, Any]:
        return self.row("sensitivity", kind, make=lambda: self.loss_increases(kind))

    def dense(self) -> dict[str, Any]:
        windows = self.arguments.curve_windows
        return self.row("curve", "dense", make=lambda: {"quality": self.quality(self.model(), windows)})

    def cells(self) -> Iterator[tuple[str, str, float, str]]:
        """(kind, method, ratio, form), the longest search first: its archive answers the shorter ones. The baselines
        have no point at the smallest ratio, and are refitted at the middle one only."""
        for method in ("greedy", ONE_SHOT, *(f"random, seed {seed}" for seed in self.arguments.seeds)):
            for kind, (_, _, (small, middle, large)) in self.kinds.items():
                if method == "greedy" and kind != CHANNELS:
                    yield from ((kind, method, asked, "raw") for asked in (large, middle, small))
                    yield from ((kind, method, asked, "refitted") for asked in (large, middle))
                elif kind not in (CHANNELS, MILLISECONDS):
                    yield from ((kind, method, asked, form) for asked, form in ((large, "raw"), (middle, "raw")))
                    yield kind, method, middle, "refitted"

    def point(self, kind: str, method: str, asked: float, form: str) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            model, row = self.cut(kind, method, asked, form)
            return {**row, "quality": self.quality(model, self.arguments.curve_windows)}

        return self.row("curve", kind, method, asked, form, make=make)

    def best(self, asked: float) -> str:
        """The kind with the smallest loss on the calibration windows at a ratio."""
        rows = {key[1]: row for key, row in self.done().items() if key[2:] == ("greedy", asked, "refitted")}
        rows.pop(MILLISECONDS, None)
        if not rows:
            raise SystemExit(f"{self.name} has no curve at {asked}; make the curves first")
        return min(rows, key=lambda kind: rows[kind]["calibration_loss"])

    def recovered(self, wanted: str) -> None:
        """A cut model, refitted and trained, against the dense one; ``dense`` trains the dense one as long.

        Arguments:
            wanted: ``kind:ratio``, ``best:ratio`` or ``dense``.
        """
        windows, minutes = self.arguments.windows, self.arguments.minutes
        self.row("final", "dense", make=lambda: {"quality": self.quality(self.model(), windows, tasks=True)})
        kind, _, amount = wanted.partition(":")
        asked = float(amount or 0)
        kind = self.best(asked) if kind == "best" else kind

        def refitted() -> dict[str, Any]:
            model, row = self.cut(kind, "greedy", asked, "refitted")
            return {**row, "quality": self.quality(model, windows, tasks=True)}

        def make() -> dict[str, Any]:
            model, row = (self.model(), {}) if kind == "dense" else self.cut(kind, "greedy", asked, "refitted")
            step = pliant.Recover(
                **RECOVERY,
                method=self.arguments.method,
                minutes=minutes,
                distillation_weight=0.0 if kind == "dense" else 0.5,
            )
            work = self.work / f"recover-{kind}-{asked}"
            given = {"tokenizer": self.tokenizer, "dense": self.model(), "work": work}
            pliant.apply(model, step, self.calibration, **given, progress=Console())
            recovery = {"settings": step.to_dict(), **model.pliant_history[-1]["recovery"]}
            return {**row, "recovery": recovery, "quality": self.quality(model, windows, tasks=True)}

        if kind != "dense":
            self.row("final", kind, asked, "refitted", make=refitted)
        self.row("final", kind, asked, f"recovered {minutes:g} minutes", make=make)

    def speed(self, kind: str, asked: float) -> None:
        """Prefill and decode of the dense and a cut model in turn, against the work that was removed."""

        def make() -> dict[str, Any]:
            model, row = self.cut(kind, "greedy", asked, "raw")
            subnet = Subnet.from_dict(row["subnet"])
            speed = pliant.bench(model, self.model(), prompt=SEQLEN, tokens=32, repeats=self.arguments.repeats)
            work = [macs(self.anatomy, each, tokens=SEQLEN) for each in (Subnet(), subnet)]
            element, both = next(model.parameters()).element_size(), (Subnet(), subnet)
            reads = [streamed_bytes(self.anatomy, each, element=element, context=SEQLEN) for each in both]
            return {**row, "predicted": {"prefill": work[0] / work[1], "decode": reads[0] / reads[1]}, "speed": speed}

        self.row("speed", kind, asked, make=make)

    def estimate(self, parts: tuple[str, ...]) -> None:
        """Print how long the parts will take that are not there yet."""
        model, done = self.model(), self.done()
        scorer = PrefixScorer(model, self.anatomy, self.windows, reuse=False)
        scorer.score(Subnet())  # the first is slower
        began = time.monotonic()
        scorer.score(Subnet())
        each = time.monotonic() - began
        row = each / len(self.windows)
        texts, minutes = len(self.arguments.held_out), dict.fromkeys(parts, 0.0)
        first = {kind: len(of.moves(Subnet())) for kind, of in self.kinds.items()}
        if "sensitivity" in parts:
            scores = sum(first[kind] for kind in self.single() if ("sensitivity", kind) not in done) + 8
            minutes["sensitivity"] = 0.6 * each * scores / 60
        if "curves" in parts:
            missing = [cell for cell in self.cells() if ("curve", *cell) not in done]
            scores = 0.0
            for kind in {kind for kind, method, *_ in missing if method == "greedy"}:
                # lazily about three scores per removal, which saves about as much as a median first one
                moves = self.kinds[kind].moves(Subnet())
                gains = sorted(ratio_of(self.anatomy, move.subnet) for move in moves)
                scores += first[kind] + 3 * self.kinds[kind].ratios[-1] / gains[len(gains) // 2]
            refits = sum(form == "refitted" for *_, form in missing)
            evaluated = row * self.arguments.curve_windows * texts + 5
            # a refit runs every layer about six times and solves for every block
            refit = 6 * each * REFIT / self.arguments.samples + 10
            minutes["curves"] = (0.6 * each * scores + evaluated * len(missing) + refit * refits) / 60
        if "recover" in parts:
            missing = (("final", "dense") not in done) + 2 * len(self.arguments.recover)
            tasks = len(self.arguments.tasks) * self.arguments.questions * 0.5 * row
            minutes["recover"] = missing * (row * self.arguments.windows * texts + tasks) / 60
            minutes["recover"] += self.arguments.minutes * len(self.arguments.recover)
        if "speed" in parts:
            minutes["speed"] = len(self.kinds) * (self.arguments.repeats + 1) * 2 * 12 * row / 60
        for part, count in minutes.items():
            print(f"{part}: about {count:.0f} minutes", flush=True)
        print(f"{len(self.windows)} calibration windows, {each:.2f} s; {torch.get_num_threads()} threads", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--model", required=True, help="folder of a transformers model with its tokenizer")
    parser.add_argument("--calibration", required=True, help="text to choose, refit and train on")
    parser.add_argument("--held-out", nargs="+", required=True, help="texts that perplexity is measured on")
    parser.add_argument("--tasks", nargs="*", default=[], help="question files")
    parser.add_argument("--work", default="build/state_space")
    parser.add_argument("--samples", type=int, default=14, help="rows of calibration text to choose on")
    parser.add_argument("--curve-windows", type=int, default=8, help="of each held-out text, for a point of a curve")
    parser.add_argument("--windows", type=int, default=120, help="of each held-out text, for the final models")
    parser.add_argument("--questions", type=int, default=200, help="of each task, for the final models")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of random orders")
    parser.add_argument("--recover", nargs="*", default=["best:0.1"], help="kind:ratio, best:ratio, or dense")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--method", default="lora", help="of the recovery: lora or full")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--speed-of", nargs="*", help="kinds; default: all")
    arguments = parser.parse_args()
    parts = tuple(arguments.parts or PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; choose from: {', '.join(PARTS)}")
    bench = Bench(arguments)
    bench.estimate(parts)
    if "sensitivity" in parts:
        for kind in bench.single():
            bench.sensitivity(kind)
        bench.row("sensitivity", "state everywhere", make=bench.everywhere)
    if "curves" in parts:
        bench.dense()
        for cell in bench.cells():
            bench.point(*cell)
    if "recover" in parts:
        for wanted in arguments.recover:
            bench.recovered(wanted)
    if "speed" in parts:
        for kind in arguments.speed_of or [kind for kind in bench.kinds if kind != CHANNELS]:
            bench.speed(kind, bench.kinds[kind].ratios[-1])


if __name__ == "__main__":
    main()
