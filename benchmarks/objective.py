"""Does it pay to weigh damage by measured milliseconds? BlockPruner per parameter, per millisecond of prefill, and of
decode.

    python benchmarks/objective.py --smollm2 DIR --calibration calibration.jsonl --held-out held-out.jsonl

For every objective a curve of perplexity against speed-up, both models timed in turn; then the speed-up of each curve
at the same perplexity, interpolated between its points. The objectives share their scores. About a quarter of an hour
on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from typing import Any

import pliant
from machine import save

OBJECTIVES = ("parameters", "prefill", "decode")
RATIOS = (0.05, 0.1, 0.15, 0.2)
PHASES = ("prefill", "decode")


def run(objective: str, ratio: float, arguments: argparse.Namespace, dense: Any) -> dict[str, Any]:
    model = pliant.load(arguments.smollm2)
    step = pliant.BlockPruner(ratio=ratio, samples=16, seqlen=256, per=objective)
    pliant.apply(model, step, pliant.text(arguments.calibration), work=arguments.work)
    (cut,) = model.pliant_history
    found = pliant.evaluate(model, perplexity=arguments.held_out, seqlen=256, windows=40)
    (held_out,) = found["perplexity"].values()
    speed = pliant.bench(model, dense, prompt=256, tokens=24, repeats=7)
    row = {"objective": objective, "asked": ratio, "ratio": cut["ratio"], "perplexity": held_out["perplexity"]}
    return {**row, "speedup": speed["speedup"], "subnet": cut["subnet"]}


def at(rows: list[dict[str, Any]], phase: str, loss: float) -> float | None:
    """Speed-up of a curve where its loss is ``loss``, None outside it."""
    points = sorted((math.log(row["perplexity"]), row["speedup"][phase]["median"]) for row in rows)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= loss <= x1:
            return y0 + (y1 - y0) * (loss - x0) / (x1 - x0) if x1 > x0 else y1
    return None


def at_equal_perplexity(curves: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Speed-up by either objective at every perplexity that one of the two curves has a point at, and both reach."""
    equal = []
    for phase in PHASES:
        found = sorted(row["perplexity"] for name in ("parameters", phase) for row in curves[name])
        for perplexity in dict.fromkeys(found):
            both = {name: at(curves[name], phase, math.log(perplexity)) for name in ("parameters", phase)}
            if None not in both.values():
                equal.append({"phase": phase, "perplexity": perplexity, "speedup": both})
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--work", default="build/objective")
    arguments = parser.parse_args()
    dense = pliant.load(arguments.smollm2)
    curves: dict[str, list[dict[str, Any]]] = {}
    for objective in OBJECTIVES:
        for ratio in RATIOS:
            curves.setdefault(objective, []).append(run(objective, ratio, arguments, dense))
            last = curves[objective][-1]
            gains = {phase: round(last["speedup"][phase]["median"], 3) for phase in PHASES}
            print(objective, ratio, f"{last['ratio']:.3f}", f"{last['perplexity']:.2f}", gains, flush=True)
    equal = at_equal_perplexity(curves)
    for row in equal:
        print(row)
    save("objective", {"curves": curves, "at_equal_perplexity": equal})


if __name__ == "__main__":
    main()
