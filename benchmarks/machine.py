"""What every raw result says of where it comes from."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import pliant
from pliant import machine as here

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        outcome = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return outcome.stdout.strip()

    return {
        **here.machine(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pliant": pliant.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        ),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    print(f"wrote {path}")
    return path
