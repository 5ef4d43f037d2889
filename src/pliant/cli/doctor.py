"""What this machine has. Versions come from package metadata, so that nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "numpy")
EXTRAS = {"gguf": "read .gguf files"}
ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def diagnose() -> dict[str, Any]:
    """Versions, processor, memory, and which extras are there."""
    cpu = _cpu()
    found: dict[str, Any] = {
        "pliant": metadata.version("pliant"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "processor": cpu["name"],
        "cores": os.cpu_count(),
        "instructions": " ".join(flag for flag in ISA if flag in cpu["flags"]) or "unknown",
        "memory": _memory(),
        "disk free": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB here",
        "kernels": "PyTorch's own",
    }
    for name, use in EXTRAS.items():
        version = _version(name)
        found[name] = (
            f"{version} ({use})" if version != "missing" else f"missing: pip install 'pliant[{name}]' to {use}"
        )
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    name, flags = platform.processor() or platform.machine(), set()
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return {"name": name, "flags": flags}


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
