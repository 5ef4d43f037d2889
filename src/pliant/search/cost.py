"""What a sub-network costs, in the currency that a search saves in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet, macs, parameters, streamed_bytes
from pliant.measure.latency import PHASES, Latency, measure_latency

CONTEXT = 1024
COSTS = ("parameters", "macs", "bytes", *PHASES)

Cost = Callable[[Subnet], float]


def cost_of(name: str, model: Any, anatomy: Anatomy, work: Path | None = None) -> Cost:
    """A cost by name.

    ``parameters``; ``macs`` of one token that attends to 1,024; ``bytes`` that decoding one token reads: weights and a cache
    of 1,024 tokens; ``prefill`` and ``decode``: milliseconds measured on this machine, see
    :func:`pliant.measure.latency.measure_latency`.

    Arguments:
        work: folder in which measured milliseconds are kept, so that a search that goes on goes on with the same.
    """
    if name in PHASES:
        path = None if work is None else work / f"latency-{name}.json"
        if path is not None and path.exists():
            table = Latency.from_dict(json.loads(path.read_text("utf-8")))
        else:
            table = measure_latency(model, anatomy, name)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(table.to_dict(), indent=1) + "\n", "utf-8")
        return lambda subnet: table.of(anatomy, subnet)
    element = next(model.parameters()).element_size()
    counted: dict[str, Cost] = {
        "parameters": lambda subnet: parameters(anatomy, subnet),
        "macs": lambda subnet: macs(anatomy, subnet, tokens=1, context=CONTEXT),
        "bytes": lambda subnet: streamed_bytes(anatomy, subnet, element=element, context=CONTEXT),
    }
    return counted[name]
