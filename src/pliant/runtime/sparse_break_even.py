"""Measure once per process from which sparsity on leaving zeros out is faster on this machine."""

from __future__ import annotations

import functools
import itertools
import statistics
import time

import torch

from pliant.runtime.library import isa, library
from pliant.runtime.packed_linear import linear
from pliant.runtime.packed_matrix import pack, room
from pliant.runtime.threads import threads

SIZE = 2048, 4096  # of the matrix that is timed
COLD = 64 << 20  # bytes that are read before a matrix is read again: more than caches hold
LOOKS = 0.5, 0.7, 0.9  # sparsities that are timed
ROUNDS = 7


def pays(format: str, sparsity: float) -> bool:
    """Whether a matrix of that sparsity is multiplied with one row faster if its zeros are left out."""
    return sparsity >= break_even(format)


def break_even(format: str) -> float:
    """The sparsity at which a format's sparse form is as fast as its dense one on this machine; above 1 if it never
    is."""
    return 2.0 if library() is None else _measured(format, isa(), threads())


@functools.cache
def _measured(format: str, _isa: str, _threads: int) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, generator=generator, dtype=torch.float32)
    order = torch.rand(SIZE, generator=generator, dtype=torch.float32)
    forms = [pack(weight, format), *(pack(weight * (order >= s), format, sparse=True) for s in LOOKS)]
    dense, *sparse = _times(forms)
    known = list(zip(LOOKS, sparse, strict=True))
    if dense <= known[-1][1]:
        return 2.0
    for (low, slow), (high, fast) in itertools.pairwise(known):
        if slow <= dense:
            return _between(0.0, 2 * dense, low, slow, dense) if low == LOOKS[0] else low
        if fast <= dense:
            return _between(low, slow, high, fast, dense)
    return LOOKS[-1]


def _between(low: float, slow: float, high: float, fast: float, wanted: float) -> float:
    """The sparsity at which the line through two timings has the wanted time."""
    return high if slow <= fast else low + (slow - wanted) / (slow - fast) * (high - low)


def _times(forms: list[torch.Tensor]) -> list[float]:
    """Median seconds of one row times each packed matrix, timed in turn and read from memory, not from caches."""
    copies = [[room(form.numel()).copy_(form) for _ in range(max(2, COLD // form.numel()))] for form in forms]
    x = torch.randn(1, SIZE[1], generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    seconds: list[list[float]] = [[] for _ in forms]
    for round_ in range(ROUNDS + 1):
        for own, of_form in zip(copies, seconds, strict=True):
            began = time.perf_counter()
            for matrix in own:
                linear(x, matrix, None, SIZE[0])
            if round_:
                of_form.append((time.perf_counter() - began) / len(own))
    return [statistics.median(of_form) for of_form in seconds]
