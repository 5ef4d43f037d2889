"""Every public name and where it is defined: steps, functions and export formats. Reading these tables imports nothing.

``pliant.NAME``, ``pliant ls``, the command line and recipes are derived from them. A new step is its file and one line here.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One public object."""

    module: str
    name: str
    summary: str = ""

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


STEPS = {
    "blockpruner": Entry("pliant.systems.blockpruner", "BlockPruner", "remove whole attention and MLP blocks"),
    "multipruner": Entry(
        "pliant.systems.multipruner", "MultiPruner", "remove blocks, then MLP channels, then attention heads"
    ),
    "multipruner_evol": Entry(
        "pliant.systems.multipruner_evol", "MultiPrunerEvol", "remove blocks, then evolve all widths together"
    ),
    "oneshot": Entry(
        "pliant.prune.oneshot", "OneShot", "rank blocks or layers once and remove the lowest (ShortGPT …)"
    ),
    "unified": Entry(
        "pliant.prune.unified", "UnifiedPruner", "blocks, channels and heads in one pool, damage per saving"
    ),
    "knapsack": Entry(
        "pliant.prune.knapsack", "KnapsackPruner", "damage at a few widths, solved as a knapsack, then swaps"
    ),
    "fisher": Entry("pliant.prune.fisher", "FisherPruner", "narrow what the loss depends on least; no search"),
    "channelpruner": Entry("pliant.prune.channels", "ChannelPruner", "narrow every layer by importance; needs no data"),
    "cut": Entry("pliant.prune.known_subnet", "Cut", "cut to a sub-network that is already known; no search"),
    "sparamx": Entry(
        "pliant.systems.sparamx", "SparAMX", "run a sparse model on a CPU, weights and cache without their zeros"
    ),
    "magnitude": Entry("pliant.values.magnitude", "Magnitude", "zero the smallest weights"),
    "rtn": Entry("pliant.values.rtn", "RTN", "round weights to nearest on a grid of few bits"),
    "packed": Entry(
        "pliant.values.pack", "PackedLinear", "pack linear layers to bf16, int8 or int4 for pliant's CPU kernels"
    ),
    "recover": Entry(
        "pliant.train.recover", "Recover", "train what was cut for a while, with or without the dense model"
    ),
}
"""Name in recipes and on the command line -> the step."""

EXPORTS = {
    "homogeneous": Entry(
        "pliant.exporters.homogeneous",
        "homogeneous",
        "whole removed layers dropped, so that stock transformers loads it",
    ),
}
"""Name of a format of ``pliant export`` -> the function that makes an ordinary model of a cut one."""

FUNCTIONS = {
    "BlockCache": "pliant.compat.block_cache",
    "PliantError": "pliant.errors",
    "Score": "pliant.measure.scores",
    "Step": "pliant.step",
    "Subnet": "pliant.elastic",
    "activate": "pliant.elastic",
    "add_architecture": "pliant.architecture",
    "anatomy_of": "pliant.anatomy",
    "apply": "pliant.run.apply",
    "bench": "pliant.measure.speed.bench",
    "check": "pliant.elastic",
    "compare": "pliant.measure.quality.compare",
    "compare_formats": "pliant.run.formats",
    "discover": "pliant.elastic",
    "evaluate": "pliant.measure.quality.evaluate",
    "examples": "pliant.data",
    "export": "pliant.run.export",
    "homogeneous": "pliant.exporters.homogeneous",
    "importance": "pliant.criteria.importance",
    "inspect": "pliant.measure.inspect",
    "load": "pliant.checkpoint.load",
    "plan": "pliant.run.plan",
    "questions": "pliant.data",
    "read_config": "pliant.prune.imported_configs",
    "run_recipe": "pliant.run.compress",
    "save": "pliant.run.save",
    "setting": "pliant.step",
    "step_of": "pliant.step",
    "text": "pliant.data",
}
"""Public function or class -> module."""


def public() -> dict[str, str]:
    """Every name of ``pliant.NAME`` and its module."""
    return {**FUNCTIONS, **{step.name: step.module for step in STEPS.values()}}
