"""Structured pruning of SmolLM2-135M side by side: methods x ratios, raw, repaired and recovered.

    python benchmarks/structured.py --smollm2 DIR --calibration calibration.jsonl --held-out held-out.jsonl \\
        --tasks FILE ...

About four hours on two free cores, as two processes of one thread each that share the lines (`OMP_NUM_THREADS=1`,
`--lines`): 5 minutes for a method at a ratio, raw and repaired, 16 for one that is recovered. Every cell is written to
results/structured.json when it is done; the same command goes on after the last one that is there. `pliant demo` leaves
the parts in build/demo/parts, `report_structured.py` draws them.

Every method chooses by the same rows of calibration text, repairs with the same rows and recovers on the same tokens,
which are disjoint from the text that perplexity is measured on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

import pliant
from machine import RESULTS, machine, save
from pliant.step import Step

RATIOS = (0.10, 0.20, 0.05, 0.15, 0.25)  # in the order they are made: what matters most first
RECOVERED = (0.10, 0.20)
SEARCHED = {"samples": 24, "seqlen": 256}
NARROWED = {**SEARCHED, "width_samples": 16}
REPAIR = 64
RECOVERY = {"steps": 64, "batch_size": 4, "seqlen": 256, "distillation_weight": 0.5, "eval_steps": 16}
WINDOWS, QUESTIONS = 40, 100

LINES: dict[str, Callable[..., Step]] = {
    "MultiPruner": lambda **s: pliant.MultiPruner(**NARROWED, **s),
    "BlockPruner": lambda **s: pliant.BlockPruner(**SEARCHED, **s),
    "knapsack": lambda **s: pliant.KnapsackPruner(**SEARCHED, **s),
    "Fisher information": lambda **s: pliant.FisherPruner(**SEARCHED, **s),
    "Block Influence": lambda **s: pliant.OneShot(by="influence", **SEARCHED, **s),
    "relative magnitude": lambda **s: pliant.OneShot(by="magnitude", **SEARCHED, **s),
    "one-shot perplexity": lambda **s: pliant.OneShot(by="perplexity", **SEARCHED, **s),
    **{
        f"random, seed {seed}": lambda seed=seed, **s: pliant.OneShot(by="random", seed=seed, **SEARCHED, **s)
        for seed in (0, 1, 2)
    },
}
TRAINED = (("MultiPruner", "recovered"), ("BlockPruner", "recovered"), ("knapsack", "repaired and recovered"))


def cells() -> Iterator[tuple[str, float, str]]:
    """(line, ratio, form), the most telling first. The dense model recovers, too: what the training text alone is
    worth."""
    yield "dense", 0, "raw"
    yield "dense", 0, "recovered"
    for ratio in RATIOS:
        for line in LINES:
            yield line, ratio, "raw"
            yield line, ratio, "repaired"
        if ratio in RECOVERED:
            for line, form in TRAINED:
                yield line, ratio, form


def run(line: str, ratio: float, form: str, arguments: argparse.Namespace, measure: Callable[[Any], dict]) -> dict:
    """One cell. Whatever follows the search, it is made once: its archive answers the next time."""
    model = pliant.load(arguments.smollm2)
    recipe: list[Step] = []
    if line != "dense":
        recipe.append(LINES[line](ratio=ratio, repair=REPAIR if form.startswith("repaired") else 0))
    if form.endswith("recovered"):
        # the dense model has no other one to learn from
        recipe.append(pliant.Recover(**{**RECOVERY, "distillation_weight": 0} if line == "dense" else RECOVERY))
    work = Path(arguments.work) / line.replace(",", "").replace(" ", "-")
    if recipe:
        pliant.apply(model, recipe, pliant.text(arguments.calibration), work=work)
    for state in work.glob("*-recover/state.safetensors"):  # belongs to this cell alone
        state.unlink()
    row: dict[str, Any] = {"line": line, "asked": ratio, "form": form, "ratio": 0.0}
    if line != "dense":
        cut = model.pliant_history[0]
        row |= {key: cut[key] for key in ("settings", "ratio", "subnet", "counters")}
    row["quality"] = compact(measure(model))
    if form.endswith("recovered"):
        row["recovery"] = {"settings": recipe[-1].to_dict(), **model.pliant_history[-1]["recovery"]}
    return row


def compact(quality: dict) -> dict:
    """Answers as strings of 0 and 1, losses in four decimals: enough to compare by, small enough to keep."""
    for row in quality["perplexity"].values():
        row["items"]["loss"] = [round(loss, 4) for loss in row["items"]["loss"]]
    for row in quality["tasks"].values():
        row["items"] = {k: v if k == "digest" else "".join(map(str, v)) for k, v in row["items"].items()}
    return quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument(
        "--lines", nargs="*", default=("dense", *LINES), help="only these, so that two processes can share the work"
    )
    parser.add_argument("--work", default="build/structured")
    arguments = parser.parse_args()

    def measure(model) -> dict:
        return pliant.evaluate(
            model,
            perplexity=arguments.held_out,
            tasks=arguments.tasks,
            seqlen=256,
            windows=WINDOWS,
            limit=QUESTIONS,
            items=True,
        )

    path = RESULTS / "structured.json"

    def rows() -> list[dict[str, Any]]:
        return json.loads(path.read_text())["rows"] if path.exists() else []

    done = {(row["line"], row["asked"], row["form"]) for row in rows()}
    Path(arguments.work).mkdir(parents=True, exist_ok=True)
    for line, ratio, form in cells():
        if line in arguments.lines and (line, ratio, form) not in done:
            row = {**run(line, ratio, form, arguments, measure), "commit": machine()["commit"]}
            with FileLock(Path(arguments.work) / "rows.lock"):  # another process may have added some meanwhile
                save("structured", {"rows": [*rows(), row]})


if __name__ == "__main__":
    main()
