"""How many threads the kernels take: as many as torch, also while torch itself is held to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Thread

import torch

_held: ContextVar[int] = ContextVar("held", default=0)


def threads() -> int:
    """As ``torch.set_num_threads`` says, or said before :func:`torch_on_one`."""
    return _held.get() or torch.get_num_threads()


@contextmanager
def torch_on_one() -> Iterator[None]:
    """Everything but the kernels on one thread, in this thread of Python.

    For code that does little between them. torch's threads wait for milliseconds, busily, after each operation that they
    share, on the cores that the kernels' threads are about to use.
    """
    before, held = torch.get_num_threads(), _held.set(threads())
    _here(1)
    try:
        yield
    finally:
        _here(before)
        _held.reset(held)


@contextmanager
def torch_on_all() -> Iterator[None]:
    """Within :func:`torch_on_one`, torch's threads for code that does much."""
    if not _held.get():
        yield
        return
    before = torch.get_num_threads()
    _here(threads())
    try:
        yield
    finally:
        _here(before)


def _here(count: int) -> None:
    """Threads of torch in this thread of Python. torch has it hold for those, too, that have not used it yet: they get all."""
    torch.set_num_threads(count)
    if count != threads():
        restoring = Thread(target=torch.set_num_threads, args=(threads(),))
        restoring.start()
        restoring.join()
