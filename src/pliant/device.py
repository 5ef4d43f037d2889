"""Devices by name, and their free memory: a CPU, an NVIDIA or AMD GPU (``cuda``), an Apple GPU (``mps``)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from pliant.errors import DeviceError, PliantError

DEVICES = ("auto", "cuda", "mps", "cpu")
_MEMINFO = Path("/proc/meminfo")
_SHORT = ("out of memory", "can't allocate memory", "not enough memory")  # phrases in the errors of allocators


def device_of(name: str | torch.device) -> torch.device:
    """The torch device of a name.

    Arguments:
        name: ``cpu``, ``cuda``, ``mps``, a numbered one such as ``cuda:1``, or ``auto``, the first available of cuda,
            mps, cpu.

    Raises:
        DeviceError: the name is unknown, or this machine has no such device.
    """
    counts = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available()), "cpu": lambda: 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count()))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in counts:
        raise DeviceError(
            f"unknown device {str(name)!r}; choose one of {', '.join(DEVICES)}, or cuda:1 for the second of several"
        )
    if (device.index or 0) >= counts[device.type]():
        names = [f"{kind}:{index}" if index else kind for kind, count in counts.items() for index in range(count())]
        raise DeviceError(
            f"torch {torch.__version__} finds no device {str(name)!r} on this machine; it finds {', '.join(names)}. "
            "Choose one of these, or auto for the first"
        )
    return device


def device_name(device: torch.device) -> str:
    """A device's name with its model: ``cpu``, ``cuda:0 (NVIDIA H100 80GB HBM3)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def wait(device: torch.device) -> None:
    """Wait until all work queued on an accelerator is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if the system does not report it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for reuse
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if _MEMINFO.exists():
        available = [line.split()[1] for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")]
        if available:
            return int(available[0]) * 1024
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error reports that a device is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) and not isinstance(error, PliantError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def empty_cache(device: torch.device) -> None:
    """Release the device memory that torch caches for reuse: it may be too fragmented for the next allocation."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: on its device, or on the CPU if the device has no float64 (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def total(tensor: torch.Tensor, dims: list[int] | None = None) -> torch.Tensor:
    """The sum over all dimensions, or over ``dims``, in float64; on the CPU if the device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).sum(dims, dtype=torch.float64)
