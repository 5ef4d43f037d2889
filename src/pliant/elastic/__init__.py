"""Sub-networks: choose, run, count and cut them."""

from pliant.elastic.activate import Elastic, activate
from pliant.elastic.check import check
from pliant.elastic.count import cache_bytes, macs, parameters, ratio, state_bytes, streamed_bytes, weight_bytes
from pliant.elastic.discover import described, discover
from pliant.elastic.extract import extract
from pliant.elastic.reorder import reorder
from pliant.elastic.subnet import Subnet, validate

__all__ = [
    "Elastic",
    "Subnet",
    "activate",
    "cache_bytes",
    "check",
    "described",
    "discover",
    "extract",
    "macs",
    "parameters",
    "ratio",
    "reorder",
    "state_bytes",
    "streamed_bytes",
    "validate",
    "weight_bytes",
]
