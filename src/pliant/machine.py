"""Describe this machine without importing anything heavy."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def machine() -> dict[str, Any]:
    """The processor, its instruction sets that kernels use, its cores, and torch's threads if torch is imported."""
    name, flags = _processor()
    torch = sys.modules.get("torch")
    return {
        "cpu": name,
        "isa": [flag for flag in ISA if flag in flags],
        "cores": os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "system": platform.system(),
    }


def _processor() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return name, flags
