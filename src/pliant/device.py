"""Where a model runs, and what that device can do: a CPU, an NVIDIA or AMD GPU (``cuda``), an Apple GPU (``mps``)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from pliant.errors import DeviceError, PliantError

DEVICES = ("auto", "cuda", "mps", "cpu")
_MEMINFO = Path("/proc/meminfo")
_SHORT = ("out of memory", "can't allocate memory", "not enough memory")  # in what an allocator says when there is none


def device_of(name: str | torch.device) -> torch.device:
    """A device by name.

    Arguments:
        name: ``cpu``, ``cuda``, ``mps``, one of several such as ``cuda:1``, or ``auto``: cuda where there is one, else mps, else
            cpu.

    Raises:
        DeviceError: there is no such device, or none on this machine.
    """
    there = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available()), "cpu": lambda: 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in there.items() if count()))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise DeviceError(
            f"there is no device {str(name)!r}; there are {', '.join(DEVICES)}, and cuda:1 for the second of several"
        )
    count = there[device.type]()
    if (device.index or 0) >= count:
        having = [f"{kind}:{index}" if index else kind for kind, counted in there.items() for index in range(counted())]
        raise DeviceError(
            f"torch {torch.__version__} finds no {str(name)!r} on this machine; it has {', '.join(having)}. auto takes the first of these"
        )
    return device


def called(device: torch.device) -> str:
    """A device as people know it: ``cpu``, ``cuda:0 (NVIDIA H100 80GB HBM3)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, for reuse
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if _MEMINFO.exists():
        found = [line.split()[1] for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")]
        if found:
            return int(found[0]) * 1024
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) and not isinstance(error, PliantError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def empty_cache(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory for reuse: what was freed may lie in pieces too small for what comes next."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: where it is, or on the CPU when its device has no float64 (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def total(tensor: torch.Tensor, dims: list[int] | None = None) -> torch.Tensor:
    """The sum over all dimensions, or over some, added up in float64; on the CPU when the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).sum(dims, dtype=torch.float64)
