"""Every public name and where it is defined. Reading these tables imports nothing.

``pliant.NAME``, ``pliant ls``, the command line and recipes are derived from them. A new step is its file and one line
here. Wherever a name of a table is accepted, ``module:Name`` is accepted too, for what is not part of pliant.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pliant.digest import digest
from pliant.errors import StepError


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
    "mamba_shedder": Entry(
        "pliant.systems.mamba_shedder", "MambaShedder", "remove blocks, scans and their parts from state-space models"
    ),
    "oneshot": Entry(
        "pliant.prune.oneshot", "OneShot", "rank blocks or layers once and remove the lowest (ShortGPT …)"
    ),
    "unified": Entry(
        "pliant.prune.unified",
        "UnifiedPruner",
        "remove blocks, channels and heads together, by loss increase per saving",
    ),
    "knapsack": Entry(
        "pliant.prune.knapsack", "KnapsackPruner", "score each block at a few widths, solve a knapsack, then try swaps"
    ),
    "fisher": Entry(
        "pliant.prune.fisher", "FisherPruner", "narrow layers where the loss depends on them least; no search"
    ),
    "channelpruner": Entry("pliant.prune.channels", "ChannelPruner", "narrow every layer by importance; needs no data"),
    "cut": Entry("pliant.prune.known_subnet", "Cut", "cut to a sub-network that is already known; no search"),
    "sparamx": Entry(
        "pliant.systems.sparamx", "SparAMX", "run a sparse model on a CPU; weights and cache are stored without zeros"
    ),
    "magnitude": Entry("pliant.values.magnitude", "Magnitude", "zero the smallest weights"),
    "rtn": Entry("pliant.values.rtn", "RTN", "round weights to nearest on a grid of few bits"),
    "packed": Entry(
        "pliant.values.pack", "PackedLinear", "pack linear layers to bf16, int8 or int4 for pliant's CPU kernels"
    ),
    "recover": Entry(
        "pliant.train.recover", "Recover", "train a cut model for a short time, on text or with distillation"
    ),
}
"""Name in recipes and on the command line -> the step."""

SCORES = {
    "perplexity": Entry(
        "pliant.measure.scores.perplexity", "Perplexity", "loss of the next token, shown as perplexity"
    ),
    "kl": Entry("pliant.measure.scores.divergence", "Divergence", "divergence from the dense model's predictions"),
}
"""Name in ``metric`` -> the score. Scores of questions are made in Python."""

SEARCHES = {
    "nsga2": Entry("pliant.searches.nsga2", "NSGA2", "evolve a front of loss and ratio (needs pymoo)"),
    "hill": Entry("pliant.searches.hill", "HillClimb", "change one width at a time, keep what lowers the loss"),
    "random": Entry("pliant.searches.random_search", "RandomSearch", "draw sub-networks at random, as a baseline"),
}
"""Name in ``width_search`` -> the search over a space."""

IMPORTANCE = {
    "l1": Entry("pliant.criteria.l1", "l1_norms", "size of the weights that produce a unit; needs no text"),
    "activation": Entry(
        "pliant.criteria.activation", "activation_sizes", "size of the unit's contribution on calibration text"
    ),
    "fisher": Entry("pliant.criteria.unit_fisher", "loss_increases", "estimated increase of the loss without the unit"),
}
"""Name in ``order`` and in ``pliant.importance`` -> the function that measures how much units matter."""

EXPORTS = {
    "homogeneous": Entry(
        "pliant.exporters.homogeneous",
        "write_homogeneous",
        "whole removed layers dropped, so that stock transformers loads it",
    ),
    "gguf": Entry(
        "pliant.exporters.gguf.export", "write_gguf", "one file for stock llama.cpp and Ollama, for uneven layers, too"
    ),
}
"""Name of a format of ``pliant export`` -> the function that writes it."""

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
    "export": "pliant.exporters.export",
    "homogeneous": "pliant.exporters.homogeneous",
    "importance": "pliant.criteria.importance",
    "inspect": "pliant.measure.inspect",
    "load": "pliant.checkpoint.load",
    "plan": "pliant.run.plan",
    "questions": "pliant.data",
    "read_config": "pliant.prune.imported_configs",
    "run_recipe": "pliant.run.compress",
    "save": "pliant.run.save",
    "setting": "pliant.step_setting",
    "step_of": "pliant.step",
    "text": "pliant.data",
}
"""Public function or class -> module."""


def public() -> dict[str, str]:
    """Every name of ``pliant.NAME`` and its module."""
    return {**FUNCTIONS, **{step.name: step.module for step in STEPS.values()}}


def find(table: Mapping[str, Entry], name: Any, what: str, *others: str, base: type | None = None) -> Any:
    """The class or function that a name stands for: one of ``table``, or ``module:Name`` of what is not part of pliant.

    Such a module is installed or lies in the current folder, which is searched last, and not at all if it is a model
    folder.

    Arguments:
        what: what is named, for messages.
        others: further names that the caller understands, for messages.
        base: what a class of one's own must derive from; None for a function.

    Raises:
        StepError: the name is unknown, or what it stands for cannot be imported or is something else.
    """
    if isinstance(name, str) and name in table:
        return table[name].load()
    module, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if "<locals>" in path:
        raise StepError(
            f"cannot find {what} {name!r}: it was defined inside a function. Move it to the top of a module"
        )
    if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        listed = ", ".join([*table, *others])
        raise StepError(f"unknown {what} {name!r}; choose from: {listed}, or name your own as module:Name")
    try:
        within = _imported(module)
    except ImportError as error:
        raise StepError(
            f"cannot import {module!r} for {what} {name!r}: {error}. Install the module, or run in its folder, which "
            "must not be a model folder"
        ) from error
    try:
        found = operator.attrgetter(path)(within)
    except AttributeError:
        hint = "; it was defined in a script or a notebook. Move it into a module" if module == "__main__" else ""
        raise StepError(
            f"cannot find {what} {name!r}: {getattr(within, '__file__', module)} does not define {path}{hint}"
        ) from None
    fits = callable(found) if base is None else isinstance(found, type) and issubclass(found, base)
    if not fits:
        kind = "a function" if base is None else f"a class that derives from {base.__name__}"
        raise StepError(f"{what} {name!r} must be {kind}; it is {found!r}")
    return found


def _imported(module: str) -> Any:
    here = Path.cwd()
    if str(here) not in sys.path and not (here / "config.json").exists():
        sys.path.append(str(here))
    importlib.invalidate_caches()
    return importlib.import_module(module)


def name_of(table: Mapping[str, Entry], found: Any) -> str:
    """The inverse of :func:`find`. A class that was defined in a script or in a function is named, too, but not found
    again."""
    for name, entry in table.items():
        if (found.__module__, found.__qualname__) == (entry.module, entry.name):
            return name
    return f"{found.__module__}:{found.__qualname__}"


def short_name(table: Mapping[str, Entry], cls: type) -> str:
    """The name of a class in a table of the registry; if it is not part of pliant, its own name in small letters."""
    return name_of(table, cls).rpartition(":")[2].rpartition(".")[2].lower()


def code_digest(modules: Iterable[str]) -> str | None:
    """A digest of the files of modules that are not part of pliant; None if there are none."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(set(modules))]
    own = [Path(file) for file in files if file and Path(__file__).parent not in Path(file).parents]
    return digest([file.read_bytes() for file in own if file.exists()]) if own else None
