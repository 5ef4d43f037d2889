"""Costs of a sub-network: parameters, multiply-accumulates, bytes, or measured milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.checkpoint.fingerprint import fingerprint
from pliant.elastic import Subnet, macs, parameters, streamed_bytes
from pliant.files import write_json
from pliant.machine import machine
from pliant.measure.speed.latency_table import PHASES, Latency, measure_latency

CONTEXT = 1024
COSTS = ("parameters", "macs", "bytes", *PHASES)

Cost = Callable[[Subnet], float]


def cost_of(name: str, model: Any, anatomy: Anatomy, path: Path | None = None) -> Cost:
    """A cost by name.

    ``parameters``; ``macs`` of one token that attends to 1,024; ``bytes`` that decoding one token streams: weights, a
    cache of 1,024 tokens, and states of convolutions and scans; ``prefill`` and ``decode``: milliseconds measured on
    this machine, see :func:`pliant.measure.speed.latency_table.measure_latency`.

    Arguments:
        path: file for measured milliseconds, so that a resumed search uses the same; those of another model or machine
            are measured again.
    """
    if name in PHASES:
        of = {
            "model": fingerprint(model),
            "device": str(model.device),
            "cpu": machine()["cpu"],
            "threads": torch.get_num_threads(),
        }
        table = _stored_table(path, of)
        if table is None:
            table = measure_latency(model, anatomy, name)
            if path is not None:
                write_json(path, {"of": of, **table.to_dict()}, indent=1)
        return lambda subnet: table.of(anatomy, subnet)
    element = next(model.parameters()).element_size()
    counted: dict[str, Cost] = {
        "parameters": lambda subnet: parameters(anatomy, subnet),
        "macs": lambda subnet: macs(anatomy, subnet, tokens=1, context=CONTEXT),
        "bytes": lambda subnet: streamed_bytes(anatomy, subnet, element=element, context=CONTEXT),
    }
    return counted[name]


def _stored_table(path: Path | None, of: dict[str, Any]) -> Latency | None:
    """The table in a file, if it was measured for this model on this machine."""
    try:
        raw = {} if path is None else json.loads(path.read_text("utf-8"))
        return Latency.from_dict(raw) if raw.get("of") == of else None
    except (OSError, ValueError):
        return None
