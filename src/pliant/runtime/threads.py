"""How many threads the kernels take: as many as torch, also while torch itself is held to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_held: ContextVar[int] = ContextVar("held", default=0)


def threads() -> int:
    """As ``torch.set_num_threads`` says, or said before :func:`torch_on_one`."""
    return _held.get() or torch.get_num_threads()


@contextmanager
def torch_on_one() -> Iterator[None]:
    """Everything but the kernels on one thread.

    For code that does little between them. torch's threads wait for milliseconds, busily, after each operation that they
    share, on the cores that the kernels' threads are about to use.
    """
    before, held = torch.get_num_threads(), _held.set(threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _held.reset(held)


@contextmanager
def torch_on_all() -> Iterator[None]:
    """Within :func:`torch_on_one`, torch's threads for code that does much."""
    if not _held.get():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
