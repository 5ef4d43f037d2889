"""Put the units of every axis in order of importance before some go: what is kept is always a prefix."""

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
    """The model with its units in order; back in the old order when what is done meanwhile fails before they are cut.

    Arguments:
        order: one of ``ORDERS``.
        windows: calibration tokens, needed for ``activation`` alone.
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
            raise  # what failed came after the cut: there are no longer as many units
        reorder(job.model, anatomy, {axis: torch.argsort(permutation) for axis, permutation in orders.items()})
        raise
