"""Weights that stay in files: for a model that is larger than the memory it may take.

Every tensor of such a model is a view of a file that is mapped into memory. The system reads its pages when they are used, and
they can be given back at any time without losing anything. A thread does so whenever what the process has taken comes near
the limit. What works on the model need not know, but for loops over all of its weights, which go through :func:`within_limit`.
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
_EVERY = 0.002  # seconds between two looks: at 10 GB/s a matrix product touches 20 MB meanwhile
_LITTLE = 2**23  # bytes of mapped pages that are not worth giving back
_TRIM = 0.5  # seconds between two looks through the heap, which take a while
_DONTNEED = 4  # of madvise, the same on every Linux
_MMAP_THRESHOLD = -3  # of mallopt, where there is one
_STATM = Path("/proc/self/statm")

Part = TypeVar("Part")


class Pages:
    """The files of one model, and the memory that this process may take beside what it has already.

    Arguments:
        limit: bytes.
        folder: where the files are; they have no names, so nothing is left behind. The temporary folder when None.

    Attributes:
        peak: most bytes taken so far.

    Raises:
        MemoryLimitError: this system does not tell how much memory a process has.
    """

    def __init__(self, limit: int, folder: Path | None = None):
        if sys.platform != "linux" or not _STATM.exists():
            raise MemoryLimitError("a memory limit needs Linux: elsewhere it could not be held")
        self.limit, self.peak = limit, 0
        self._folder = folder
        self._libc = ctypes.CDLL(None)
        self._trimmed = 0.0
        self._glibc = hasattr(self._libc, "mallopt")
        if self._glibc:  # freed tensors go back to the system at once instead of staying in the heap
            self._libc.mallopt(_MMAP_THRESHOLD, 2**17)
        self._stored: list[torch.UntypedStorage] = []
        self._before, self._libraries = _resident()  # the code of libraries is pages of files, too
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="pliant pages").start()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a file of its own, zero everywhere.

        Raises:
            ArtefactError: the disk is full, or the folder cannot be written.
        """
        count = max(1, math.prod(shape) * dtype.itemsize)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="pliant-") as file:
                # now rather than when it is written to: on a full disk that would kill the process
                os.posix_fallocate(file.fileno(), 0, count)
                storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=count)
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise ArtefactError(
                f"cannot keep weights in {str(where)!r}: {error.strerror or error}; the environment variable TMPDIR names another "
                "folder"
            ) from error
        self._stored.append(storage)  # pyright: ignore[reportArgumentType]
        return torch.empty(0, dtype=dtype).set_(storage).view(-1)[: math.prod(shape)].view(shape)  # pyright: ignore

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor, in a file."""
        return self.tensor(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def watch(self, model: nn.Module) -> None:
        """Look before every module of ``model`` that has weights of its own runs, beside what the thread sees."""
        pages = weakref.ref(self)  # a copy of the model has the hooks, too, and must not keep the files

        def look(*_: Any) -> None:
            if (alive := pages()) is not None:
                alive.hold()

        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(look)

    def hold(self) -> None:
        """Give pages back if memory is short."""
        whole, mapped = _resident()
        taken = whole - self._before
        self.peak = max(self.peak, taken)
        if taken > NEAR * self.limit and mapped > self._libraries + _LITTLE:
            self.release()

    def release(self) -> None:
        """Give back every page of these files, and what is free of the heap. What was written to the files stays there."""
        if self._glibc and time.monotonic() - self._trimmed > _TRIM:
            self._libc.malloc_trim(0)
            self._trimmed = time.monotonic()
        for storage in self._stored:
            self._libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _DONTNEED)

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copy of a model has its weights in memory."""


def pages_of(model: Any) -> Pages | None:
    """The files that a model was loaded into, None for one that is in memory."""
    return getattr(model, "pliant_pages", None)


def in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor is kept in a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def within_limit(model: Any, parts: Iterable[Part]) -> Iterator[Part]:
    """Iterate over parts of a model, such as its tensors or layers; after each, give pages back if memory is short.

    A loop that touches all weights needs this, because the thread that watches memory may come too late.
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
    """Bytes of this process in memory: all, and those that are pages of files."""
    _, resident, shared, *_ = _STATM.read_bytes().split()
    return int(resident) * mmap.PAGESIZE, int(shared) * mmap.PAGESIZE
