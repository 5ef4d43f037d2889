"""The number of threads of the kernels: torch's, even while torch itself is limited to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Thread

import torch

_held: ContextVar[int] = ContextVar("held", default=0)


def threads() -> int:
    """The number that ``torch.set_num_threads`` set, before :func:`torch_on_one` if that is active."""
    return _held.get() or torch.get_num_threads()


@contextmanager
def torch_on_one() -> Iterator[None]:
    """Run everything but the kernels on one thread, in this Python thread.

    This is for code that does little between kernels. After each operation that they share, torch's threads wait busily
    for milliseconds on the cores that the kernels' threads are about to use.
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
    """Within :func:`torch_on_one`, give torch its threads back for code that does much."""
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
    """Set the number of torch's threads in this Python thread.

    Python threads that have not used torch yet would inherit it, so the full number is restored for them.
    """
    torch.set_num_threads(count)
    if count != threads():
        restoring = Thread(target=torch.set_num_threads, args=(threads(),))
        restoring.start()
        restoring.join()
