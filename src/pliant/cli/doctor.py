"""Facts about this machine. Versions come from package metadata, so that nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from pliant.machine import machine
from pliant.runtime import library

PACKAGES = ("torch", "transformers", "safetensors", "numpy")
EXTRAS = {"gguf": "read .gguf files"}


def diagnose() -> dict[str, Any]:
    """Versions, processor, memory, kernels, and the installed extras."""
    here = machine()
    found: dict[str, Any] = {
        "pliant": metadata.version("pliant"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "processor": here["cpu"],
        "cores": here["cores"],
        "instructions": " ".join(here["isa"]) or "unknown",
        "memory": _memory(),
        "disk free": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB here",
        "kernels": library.state(),
        "bandwidth": _bandwidth(here["cores"]),
    }
    for name, use in EXTRAS.items():
        version = _version(name)
        found[name] = (
            f"{version} ({use})" if version != "missing" else f"missing: pip install 'pliant[{name}]' to {use}"
        )
    return found


def _bandwidth(cores: int) -> str:
    """The memory bandwidth, which limits token generation."""
    rates = {threads: library.bandwidth(threads) / 1e9 for threads in sorted({1, cores})}
    if not all(rates.values()):
        return "not measured: the kernels are missing"
    return ", ".join(f"{rate:.0f} GB/s with {threads} thread{'s' * (threads > 1)}" for threads, rate in rates.items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
