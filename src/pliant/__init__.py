"""pliant: the smallest, fastest version of a pre-trained model that still does the job.

Importing pliant is cheap: nothing below loads torch or transformers before it is used. It also makes transformers'
``from_pretrained`` rebuild the per-layer shapes of models that pliant has cut.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pliant.compat.hook import install as _install
from pliant.registry import public as _public

if TYPE_CHECKING:
    from pliant.anatomy import anatomy_of as anatomy_of
    from pliant.architecture import add_architecture as add_architecture
    from pliant.checkpoint.load import load as load
    from pliant.compat.block_cache import BlockCache as BlockCache
    from pliant.criteria.importance import importance as importance
    from pliant.data import examples as examples
    from pliant.data import questions as questions
    from pliant.data import text as text
    from pliant.elastic import Subnet as Subnet
    from pliant.elastic import activate as activate
    from pliant.elastic import check as check
    from pliant.elastic import discover as discover
    from pliant.errors import PliantError as PliantError
    from pliant.exporters.export import export as export
    from pliant.exporters.homogeneous import homogeneous as homogeneous
    from pliant.measure.inspect import inspect as inspect
    from pliant.measure.quality.compare import compare as compare
    from pliant.measure.quality.evaluate import evaluate as evaluate
    from pliant.measure.scores import Score as Score
    from pliant.measure.speed.bench import bench as bench
    from pliant.prune.channels import ChannelPruner as ChannelPruner
    from pliant.prune.fisher import FisherPruner as FisherPruner
    from pliant.prune.imported_configs import read_config as read_config
    from pliant.prune.knapsack import KnapsackPruner as KnapsackPruner
    from pliant.prune.known_subnet import Cut as Cut
    from pliant.prune.oneshot import OneShot as OneShot
    from pliant.prune.unified import UnifiedPruner as UnifiedPruner
    from pliant.run.apply import apply as apply
    from pliant.run.compress import run_recipe as run_recipe
    from pliant.run.formats import compare_formats as compare_formats
    from pliant.run.plan import plan as plan
    from pliant.run.save import save as save
    from pliant.step import Step as Step
    from pliant.step import step_of as step_of
    from pliant.step_setting import setting as setting
    from pliant.systems.blockpruner import BlockPruner as BlockPruner
    from pliant.systems.mamba_shedder import MambaShedder as MambaShedder
    from pliant.systems.multipruner import MultiPruner as MultiPruner
    from pliant.systems.multipruner_evol import MultiPrunerEvol as MultiPrunerEvol
    from pliant.systems.sparamx import SparAMX as SparAMX
    from pliant.train.recover import Recover as Recover
    from pliant.values.magnitude import Magnitude as Magnitude
    from pliant.values.pack import PackedLinear as PackedLinear
    from pliant.values.rtn import RTN as RTN

__version__ = "0.1.0"

_PUBLIC = _public()

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
