"""What a tenth less costs SmolLM2-135M: BlockPruner and MultiPruner on the same calibration text.

    python benchmarks/quality.py --smollm2 DIR --calibration calibration.jsonl --held-out held-out.jsonl --tasks FILE ...

The parts are those of the demo: `pliant demo` leaves them in build/demo/parts.
"""

from __future__ import annotations

import argparse
import time

import pliant
from machine import save

WIDTHS = {"samples": 12, "width_samples": 12, "seqlen": 256}
STEPS = {
    "BlockPruner": lambda ratio: pliant.BlockPruner(ratio=ratio, samples=16, seqlen=256),
    "BlockPruner, repaired": lambda ratio: pliant.BlockPruner(ratio=ratio, samples=16, seqlen=256, repair=64),
    "MultiPruner 40:60:0": lambda ratio: pliant.MultiPruner(ratio=ratio, split="40:60:0", **WIDTHS),
    "MultiPruner 40:60:0, repaired": lambda ratio: pliant.MultiPruner(
        ratio=ratio, split="40:60:0", repair=64, **WIDTHS
    ),
    "MultiPruner 44:52:4": lambda ratio: pliant.MultiPruner(ratio=ratio, **WIDTHS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--work", default="build/quality")
    parser.add_argument("--only", nargs="*", default=list(STEPS))
    arguments = parser.parse_args()

    def measure(model) -> dict:
        return pliant.evaluate(
            model, perplexity=arguments.held_out, tasks=arguments.tasks, seqlen=256, windows=64, limit=200
        )

    rows = {"dense": {"quality": measure(pliant.load(arguments.smollm2))}}
    print("dense", rows["dense"], flush=True)
    for name in arguments.only:
        model = pliant.load(arguments.smollm2)
        began = time.perf_counter()
        work = (
            f"{arguments.work}/{name.partition(',')[0].replace(' ', '-').replace(':', '-')}"  # repair shares the search
        )
        pliant.apply(model, STEPS[name](arguments.ratio), pliant.text(arguments.calibration), work=work)
        (step,) = model.pliant_history
        rows[name] = {
            "seconds": time.perf_counter() - began,
            "ratio": step["ratio"],
            "settings": step["settings"],
            "counters": step["counters"],
            "quality": measure(model),
            "subnet": step["subnet"],
        }
        print(name, {k: v for k, v in rows[name].items() if k not in ("subnet", "settings")}, flush=True)
    save("quality", {"rows": rows})


if __name__ == "__main__":
    main()
