"""Sort the units of every axis by importance before some are removed: a sub-network always keeps the first units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pliant.anatomy import Anatomy
from pliant.criteria import by_falling, l1_orders
from pliant.criteria.importance import measured
from pliant.elastic.reorder import reorder, restore
from pliant.step import Job

STORED = "stored"


@contextmanager
def ordered(job: Job, anatomy: Anatomy, order: str, windows: torch.Tensor | None = None) -> Iterator[None]:
    """Context in which the units of the model are sorted; the old order is restored if an error comes before the cut.

    Arguments:
        order: the name of an importance, or ``stored``.
        windows: calibration tokens, for an importance that reads text.
    """
    orders = {} if order == STORED else l1_orders(job.model, anatomy)
    if order not in ("l1", STORED):
        with job.progress.stage(f"order by {order}"):
            sizes = measured(job.model, anatomy, order, windows)
            if others := sorted({anatomy.axes[name].leader for name in orders.keys() - sizes.keys()}):
                job.progress.note(f"  {order} measures no units of {', '.join(others)}: they are sorted by l1")
            orders |= by_falling(sizes, anatomy)
    reorder(job.model, anatomy, orders)
    shapes = [parameter.shape for parameter in job.model.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C, too
        if shapes != [parameter.shape for parameter in job.model.parameters()]:
            raise  # the error came after the cut: the removed units cannot be restored
        restore(job.model, anatomy, orders)
        raise
