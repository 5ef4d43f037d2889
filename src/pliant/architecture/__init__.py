"""Model families as data: one YAML file each. Needs neither torch nor transformers."""

from pliant.architecture.spec import (
    Architecture,
    AxisSpec,
    BlockSpec,
    NativeSpec,
    Part,
    add_architecture,
    architecture_of,
    catalogue,
    families,
    parse,
    shipped,
)

__all__ = [
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
