"""Seeds for the random draws of a training: every draw has its own, so that none depends on those before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pliant.digest import digest


def seed_of(purpose: str, seed: int, number: int = 0) -> int:
    """A separate seed for every purpose and number."""
    return int.from_bytes(bytes.fromhex(digest([f"{purpose} {seed} {number}"], size=8)), "little") >> 1


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """While inside, torch's generators (dropout, initial values) start from ``seed``. Afterwards they are as before."""
    kept = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not cover mps
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        if kept is not None:
            torch.mps.set_rng_state(kept)
