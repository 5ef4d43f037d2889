"""Put the units of every axis in order of importance before some go: what is kept is always a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from pliant.anatomy import Anatomy
from pliant.elastic import reorder
from pliant.importance import l1_orders
from pliant.measure.activation import activation_orders
from pliant.measure.fisher import damage_of_units
from pliant.step import Job, StepError

STORED = "stored"
READING = ("activation", "fisher")  # they look at calibration text
ORDERS = ("l1", *READING, STORED)


def check_order(order: str) -> None:
    """Raises:
    StepError: when there is no such order.
    """
    if order not in ORDERS:
        raise StepError(f"units are put in order by {', '.join(ORDERS)}; not by {order!r}")


@contextmanager
def ordered(job: Job, anatomy: Anatomy, order: str, windows: torch.Tensor | None = None) -> Iterator[None]:
    """The model with its units in order; back in the old order when what is done meanwhile fails.

    Arguments:
        order: one of ``ORDERS``.
        windows: calibration tokens, which the orders in ``READING`` need.
    """
    orders = {} if order == STORED else l1_orders(job.model, anatomy)
    if order in READING:
        assert windows is not None
        with job.progress.stage(f"order by {order}"):
            if order == "fisher":
                found = _by_falling(damage_of_units(job.model, anatomy, windows, job.progress))
            else:
                found = activation_orders(job.model, anatomy, windows)
        orders |= found  # experts, which no matrix reads, keep their L1 order
    reorder(job.model, anatomy, orders)
    try:
        yield
    except BaseException:  # Ctrl-C, too
        reorder(job.model, anatomy, {axis: torch.argsort(permutation) for axis, permutation in orders.items()})
        raise


def _by_falling(sizes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Old index of each new unit when the largest comes first; of equal ones the earlier."""
    return {name: torch.argsort(size, descending=True, stable=True) for name, size in sizes.items()}
