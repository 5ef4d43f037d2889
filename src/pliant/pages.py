"""Keep weights in files, for a model that is larger than the memory it may take.

Every tensor of such a model is a view of a file that is mapped into memory. The system reads its pages when they are
used, and they can be given back at any time without losing anything. A thread gives them back whenever the memory of
the process comes near the limit. Other code need not know of this, except for loops over all weights, which go through
:func:`within_limit`.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pliant.errors import ArtefactError, MemoryLimitError

NEAR = 0.7  # share of the limit at which pages are given back
_EVERY = 0.002  # seconds between two checks: at 10 GB/s a matrix product touches 20 MB meanwhile
_LITTLE = 2**23  # bytes of mapped pages that are not worth giving back
_TRIM = 0.5  # seconds between two calls of malloc_trim, which is slow
_DONTNEED = 4  # of madvise, the same on every Linux
_MMAP_THRESHOLD = -3  # of mallopt, where there is one
_STATM = Path("/proc/self/statm")

Part = TypeVar("Part")


class Pages:
    """The files of one model, and the limit on the memory that this process takes.

    Arguments:
        limit: bytes that the process may take on top of what it has already.
        folder: folder for the files, None for the temporary folder. The files have no names, so nothing is left behind.

    Attributes:
        peak: largest number of bytes taken so far.

    Raises:
        MemoryLimitError: this system does not report how much memory a process has.
    """

    def __init__(self, limit: int, folder: Path | None = None):
        if sys.platform != "linux" or not _STATM.exists():
            raise MemoryLimitError("a memory limit needs Linux; this system cannot enforce one")
        self.limit, self.peak = limit, 0
        self._folder = folder
        self._libc = ctypes.CDLL(None)
        self._trimmed = 0.0
        self._glibc = hasattr(self._libc, "mallopt")
        if self._glibc:  # freed tensors go back to the system at once instead of staying in the heap
            self._libc.mallopt(_MMAP_THRESHOLD, 2**17)
        self._stored: list[torch.UntypedStorage] = []
        self._before, self._libraries = _resident()  # the code of libraries is in mapped pages, too
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="pliant pages").start()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros in a file of its own.

        Raises:
            ArtefactError: the disk is full, or the folder cannot be written.
        """
        count = max(1, math.prod(shape) * dtype.itemsize)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="pliant-") as file:
                # allocate now: on a full disk, a later write would kill the process
                os.posix_fallocate(file.fileno(), 0, count)
                storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=count)
        except OSError as error:
            folder = self._folder or tempfile.gettempdir()
            raise ArtefactError(
                f"cannot keep weights in {str(folder)!r}: {error.strerror or error}; set the environment variable "
                "TMPDIR to another folder"
            ) from error
        self._stored.append(storage)  # pyright: ignore[reportArgumentType]
        return torch.empty(0, dtype=dtype).set_(storage).view(-1)[: math.prod(shape)].view(shape)  # pyright: ignore

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor, in a file."""
        return self.tensor(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def watch(self, model: nn.Module) -> None:
        """Also check memory before each module of ``model`` that has weights of its own runs."""
        pages = weakref.ref(self)  # a copy of the model has the hooks, too, and must not keep the files alive

        def check(*_: Any) -> None:
            if (alive := pages()) is not None:
                alive.hold()

        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(check)

    def hold(self) -> None:
        """Give pages back if memory is short."""
        whole, mapped = _resident()
        taken = whole - self._before
        self.peak = max(self.peak, taken)
        if taken > NEAR * self.limit and mapped > self._libraries + _LITTLE:
            self.release()

    def release(self) -> None:
        """Give back every page of these files and the free part of the heap. The files keep their contents."""
        if self._glibc and time.monotonic() - self._trimmed > _TRIM:
            self._libc.malloc_trim(0)
            self._trimmed = time.monotonic()
        for storage in self._stored:
            self._libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _DONTNEED)

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """Return None, because a copy of a model has its weights in memory."""


def pages_of(model: Any) -> Pages | None:
    """The files that a model was loaded into; None if it is in memory."""
    return getattr(model, "pliant_pages", None)


def in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor is kept in a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def within_limit(model: Any, parts: Iterable[Part]) -> Iterator[Part]:
    """Iterate over parts of a model, such as its tensors or layers; after each, give pages back if memory is short.

    A loop that touches all weights needs this, because the thread that checks memory may act too late.
    """
    pages = pages_of(model)
    for part in parts:
        yield part
        if pages is not None:
            pages.hold()


def _watch(pages: weakref.ref[Pages]) -> None:
    while (alive := pages()) is not None:
        alive.hold()
        del alive
        time.sleep(_EVERY)


def _resident() -> tuple[int, int]:
    """Bytes of this process in memory: all of them, and those of mapped files."""
    _, resident, shared, *_ = _STATM.read_bytes().split()
    return int(resident) * mmap.PAGESIZE, int(shared) * mmap.PAGESIZE
