"""What laziness costs: exact and lazy search on the same windows, up to a fifth of the model.

    python benchmarks/lazy.py --smollm2 DIR --calibration calibration.jsonl --held-out held-out.jsonl [--stories DIR]

BlockPruner on SmolLM2-135M, MultiPruner with all three stages on stories260K, which is small enough for an exact search
over widths. Perplexity on the calibration windows is what the searches minimise; that on held-out text is what a user
gets. About three quarters of an hour on two cores; every score is kept, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pliant
from machine import save
from pliant.step import Step

RATIOS = (0.05, 0.1, 0.15, 0.2)
MODES = ("exact", "lazy")


def step_for(name: str, ratio: float, mode: str) -> Step:
    if name == "SmolLM2-135M":
        return pliant.BlockPruner(ratio=ratio, samples=12, seqlen=256, search=mode)
    return pliant.MultiPruner(ratio=ratio, samples=16, width_samples=16, seqlen=256, mlp_group=16, search=mode)


def run(name: str, folder: str, ratio: float, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = pliant.load(folder)
    work = Path(arguments.work) / name  # a score is a score, whichever search asks for it
    pliant.apply(model, step_for(name, ratio, mode), pliant.text(arguments.calibration), work=work)
    (cut,) = model.pliant_history
    found = pliant.evaluate(model, perplexity=arguments.held_out, seqlen=256, windows=40)
    (held_out,) = found["perplexity"].values()
    return {
        "ratio": cut["ratio"],
        "calibration": math.exp(cut["points"][-1]["loss"]),
        "held_out": held_out["perplexity"],
        "counters": cut["counters"],
        "subnet": cut["subnet"],
        "path": [point["unit"] for point in cut["points"]],
    }


def falls(archive: Path, path: list[str]) -> list[dict[str, Any]]:
    """By which share less a block hurts after a removal than before it, by its distance from what went: 1 is next to
    it, and 5 stands for all that is farther, too.

    Arguments:
        archive: of the exact search over blocks.
        path: what it removed, in turn.
    """
    rows = (json.loads(line) for line in archive.read_text("utf-8").splitlines()[1:])
    scores = {frozenset(row["skip"]): row["score"] for row in rows}
    units = [unit for gone in scores if len(gone) == 1 for unit in gone]  # the first step goes through them in order

    def damage(gone: list[str], unit: str) -> float:
        return scores[frozenset((*gone, unit))] - scores[frozenset(gone)]

    by_distance: dict[int, list[float]] = {}
    for step, unit in enumerate(path[:-1]):
        before = [u for u in units if u not in path[:step]]
        place = before.index(unit)
        for other in before:
            was = damage(path[:step], other)
            if other != unit and 0.01 < was < 0.3:  # of those that may go soon; in nats per token
                distance = min(abs(before.index(other) - place), 5)
                by_distance.setdefault(distance, []).append(1 - damage(path[: step + 1], other) / was)
    return [
        {"distance": distance, "blocks": len(found), **quantiles(sorted(found))}
        for distance, found in sorted(by_distance.items())
    ]


def quantiles(ordered: list[float]) -> dict[str, float]:
    return {f"{share:.0%}": ordered[int(share * len(ordered))] for share in (0.1, 0.5, 0.9, 0.97)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--stories")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--work", default="build/lazy")
    arguments = parser.parse_args()
    models = {"stories260K": arguments.stories} if arguments.stories else {}
    models["SmolLM2-135M"] = arguments.smollm2
    rows = []
    for name, folder in models.items():
        for ratio in RATIOS:
            row: dict[str, Any] = {"model": name, "asked": ratio}
            row |= {mode: run(name, folder, ratio, mode, arguments) for mode in MODES}
            row["lazy_over_exact"] = {key: row["lazy"][key] / row["exact"][key] for key in ("calibration", "held_out")}
            rows.append(row)
            print(name, ratio, row["lazy_over_exact"], flush=True)
            save("lazy", {"rows": rows})
    archive = next((Path(arguments.work) / "SmolLM2-135M").glob("1-*/search.jsonl"))
    save("lazy", {"rows": rows, "falls": falls(archive, rows[-1]["exact"]["path"])})


if __name__ == "__main__":
    main()
