"""A run that may take half the memory of the model: the same result, and what it costs in time.

    python benchmarks/memory.py --smollm2 DIR --calibration calibration.jsonl

The same command twice, each in a process of its own: with the weights in memory, and with --memory set to half of what
they take in float32. The limit is on what the process takes beside Python and its libraries.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import pliant
from machine import save

PROGRAM = [sys.executable, "-c", "from pliant.cli import main; main()"]
SETTINGS = ["--ratio", "0.05", "--windows", "8", "--no-speed", "--overwrite", "--dtype", "float32", "--json"]
SETTINGS += [word for s in ("samples=6", "width_samples=6", "seqlen=256") for word in ("--set", s)]


def run(arguments: argparse.Namespace, name: str, *more: str) -> dict:
    out = Path(arguments.work) / name
    shutil.rmtree(out, ignore_errors=True)  # pliant would find its work done
    command = ["compress", arguments.smollm2, "--data", arguments.calibration, "--out", str(out), *SETTINGS, *more]
    began = time.perf_counter()
    outcome = subprocess.run([*PROGRAM, *command], stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(outcome.stdout)
    (step,) = report["steps"]
    return {
        "seconds": time.perf_counter() - began,
        "memory": report.get("memory"),
        "peak_resident": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "ratio": report["ratio"],
        "subnet": step["subnet"],
        "perplexity": report["after"]["quality"]["perplexity"],
        "counters": step["counters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--work", default="build/memory")
    arguments = parser.parse_args()
    weights = sum(p.numel() * 4 for p in pliant.load(arguments.smollm2).parameters())
    # the limited run first: the peak that the system reports of ended processes is that of the largest
    limited = run(arguments, "limited", "--memory", str(weights // 2))
    plain = run(arguments, "plain")
    one, other = (pliant.load(Path(arguments.work) / name).state_dict() for name in ("limited", "plain"))
    same = one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    rows = {"weights": weights, "plain": plain, "limited": limited}
    rows |= {"same_subnet": limited["subnet"] == plain["subnet"], "same_weights": same}
    print({key: rows[key] for key in ("weights", "same_subnet", "same_weights")}, limited["memory"], limited["seconds"])
    save("memory", {"rows": rows})


if __name__ == "__main__":
    main()
