"""The known architecture files: those that ship with pliant, and those that this process has added."""

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
    architectures: dict[str, Architecture] = {}
    for file in sorted(resources.files("pliant.architecture").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            architecture = parse(name, yaml.safe_load(file.read_text("utf-8")))
            for model_type in architecture.models:
                if model_type in architectures:
                    other = architectures[model_type].name
                    raise ArchitectureError(
                        f"{model_type!r} is in both {other}.yaml and {name}.yaml; delete one of them"
                    )
                architectures[model_type] = architecture
    return architectures


_added: dict[str, Architecture] = {}


def catalogue() -> dict[str, Architecture]:
    """All known architectures, by ``model_type``: those that ship with pliant and those that were added."""
    return {**shipped(), **_added}


def add_architecture(file: str | Path) -> Architecture:
    """Add an architecture file of your own for this process; it takes precedence over one that ships with pliant.

    Models cut with it carry it in their config.json, so that they load where the file is missing.

    Raises:
        ArchitectureError: the file cannot be read, or its content has faults; the message lists all of them.
    """
    path = Path(file).expanduser()
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
        UnknownArchitectureError: no file describes it; the message lists the known ones.
    """
    known = catalogue()
    if model_type not in known:
        raise UnknownArchitectureError(
            f"no architecture file describes model_type {model_type!r}; known types: {', '.join(sorted(known))}. "
            "Write one: see docs/architectures.md, pliant.add_architecture, and the option --architecture"
        )
    return known[model_type]


def families() -> dict[str, str]:
    """The blocks of each ``model_type``, with the axes that can be cut."""
    return {
        model_type: ", ".join(_cuttable(architecture, spec) for spec in architecture.blocks)
        for model_type, architecture in sorted(catalogue().items())
    }


def _cuttable(architecture: Architecture, spec: BlockSpec) -> str:
    axes = [name for name in architecture.leaders(spec) if architecture.axes[name].cut]
    return f"{spec.kind} ({', '.join(axes) or 'whole only'})"
