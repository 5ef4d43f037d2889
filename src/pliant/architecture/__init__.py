"""Model families as data: one YAML file each. Needs neither torch nor transformers."""

from pliant.architecture.format import ROLES, Architecture, AxisSpec, BlockSpec, NativeSpec, Part
from pliant.architecture.known_families import add_architecture, architecture_of, catalogue, families, shipped
from pliant.architecture.parser import parse

__all__ = [
    "ROLES",
    "Architecture",
    "AxisSpec",
    "BlockSpec",
    "NativeSpec",
    "Part",
    "add_architecture",
    "architecture_of",
    "catalogue",
    "families",
    "parse",
    "shipped",
]
