"""Sort the units of every axis by importance before some are removed: a sub-network always keeps the first units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pliant.anatomy import Anatomy
from pliant.criteria import l1_orders
from pliant.criteria.activation import activation_orders
from pliant.elastic import reorder
from pliant.step import Job

ORDERS = ("l1", "activation", "stored")


@contextmanager
def ordered(job: Job, anatomy: Anatomy, order: str, windows: torch.Tensor | None = None) -> Iterator[None]:
    """Context in which the units of the model are sorted; the old order is restored if an error comes before the cut.

    Arguments:
        order: one of ``ORDERS``.
        windows: calibration tokens; only ``activation`` needs them.
    """
    orders = {} if order == "stored" else l1_orders(job.model, anatomy)
    if order == "activation":
        assert windows is not None
        with job.progress.stage("order by activation"):
            # experts, which no matrix reads, keep their L1 order
            orders |= activation_orders(job.model, anatomy, windows)
    reorder(job.model, anatomy, orders)
    shapes = [parameter.shape for parameter in job.model.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C, too
        if shapes != [parameter.shape for parameter in job.model.parameters()]:
            raise  # the error came after the cut: the removed units cannot be restored
        reorder(job.model, anatomy, {axis: torch.argsort(permutation) for axis, permutation in orders.items()})
        raise
