"""The architecture files that are known: those that ship with pliant, and those that a process adds."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from pliant.architecture.format import Architecture, BlockSpec
from pliant.architecture.parser import parse
from pliant.errors import ArchitectureError, UnknownArchitectureError


@cache
def shipped() -> dict[str, Architecture]:
    """Every architecture file that ships with pliant, by ``model_type``."""
    found: dict[str, Architecture] = {}
    for file in sorted(resources.files("pliant.architecture").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            architecture = parse(name, yaml.safe_load(file.read_text("utf-8")))
            for model_type in architecture.models:
                if model_type in found:
                    raise ArchitectureError(f"{model_type!r} is in both {found[model_type].name}.yaml and {name}.yaml")
                found[model_type] = architecture
    return found


_added: dict[str, Architecture] = {}


def catalogue() -> dict[str, Architecture]:
    """Every architecture known, by ``model_type``: what ships with pliant and what was added."""
    return {**shipped(), **_added}


def add_architecture(file: str | Path) -> Architecture:
    """Make an architecture file of your own known, for this process; it goes before one that ships with pliant.

    Models cut with it carry it in their config.json, so that they load where the file is not.

    Raises:
        ArchitectureError: no such file, or its content is no architecture; every fault is listed.
    """
    path = Path(file)
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArchitectureError(f"cannot read the architecture file {str(path)!r}: {error}") from None
    architecture = parse(path.stem, raw)
    _added.update(dict.fromkeys(architecture.models, architecture))
    return architecture


def architecture_of(model_type: str) -> Architecture:
    """The architecture of a ``model_type``.

    Raises:
        UnknownArchitectureError: when no file describes it; the message lists those that are.
    """
    known = catalogue()
    if model_type not in known:
        raise UnknownArchitectureError(
            f"no architecture file describes model_type {model_type!r}; known are {', '.join(sorted(known))}. "
            "One YAML file adds it: see docs/architectures.md, pliant.add_architecture, and the option --architecture"
        )
    return known[model_type]


def families() -> dict[str, str]:
    """model_type -> what of it can be cut."""
    return {
        model_type: ", ".join(_cuttable(architecture, spec) for spec in architecture.blocks)
        for model_type, architecture in sorted(catalogue().items())
    }


def _cuttable(architecture: Architecture, spec: BlockSpec) -> str:
    axes = [name for name in architecture.leaders(spec) if architecture.axes[name].cut]
    return f"{spec.kind} ({', '.join(axes) or 'whole only'})"
