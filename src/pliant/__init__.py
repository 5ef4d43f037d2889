"""pliant: the smallest, fastest version of a pre-trained model that still does the job.

Importing pliant is cheap: nothing below loads torch or transformers before it is used. It also makes transformers'
``from_pretrained`` rebuild the per-layer shapes of models that pliant has cut.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pliant.compat.layers import install as _install

if TYPE_CHECKING:
    from pliant.anatomy import anatomy_of as anatomy_of
    from pliant.checkpoint.load import load as load
    from pliant.data import questions as questions
    from pliant.data import text as text
    from pliant.elastic import Subnet as Subnet
    from pliant.elastic import activate as activate
    from pliant.elastic import check as check
    from pliant.errors import PliantError as PliantError
    from pliant.export.homogeneous import homogeneous as homogeneous
    from pliant.measure.evaluate import evaluate as evaluate
    from pliant.measure.inspect import inspect as inspect
    from pliant.measure.speed import bench as bench
    from pliant.run.apply import apply as apply
    from pliant.run.save import save as save
    from pliant.search.cut import Cut as Cut
    from pliant.systems.blockpruner import BlockPruner as BlockPruner
    from pliant.systems.multipruner import MultiPruner as MultiPruner
    from pliant.systems.multipruner import read_config as read_config

__version__ = "0.1.0"

_PUBLIC = {
    "Cut": "pliant.search.cut",
    "BlockPruner": "pliant.systems.blockpruner",
    "MultiPruner": "pliant.systems.multipruner",
    "PliantError": "pliant.errors",
    "Subnet": "pliant.elastic",
    "activate": "pliant.elastic",
    "anatomy_of": "pliant.anatomy",
    "apply": "pliant.run.apply",
    "bench": "pliant.measure.speed",
    "check": "pliant.elastic",
    "evaluate": "pliant.measure.evaluate",
    "homogeneous": "pliant.export.homogeneous",
    "inspect": "pliant.measure.inspect",
    "load": "pliant.checkpoint.load",
    "read_config": "pliant.systems.multipruner",
    "questions": "pliant.data",
    "save": "pliant.run.save",
    "text": "pliant.data",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pliant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
