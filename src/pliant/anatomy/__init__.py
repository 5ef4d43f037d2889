"""What a model is made of: blocks in order, and the axes that tie their tensors together."""

from pliant.anatomy.anatomy import (
    Anatomy,
    Attribute,
    Axis,
    Block,
    Weight,
    anatomy_of,
    blocks_of,
    described_by,
    global_size,
    layers_of,
    plain_config,
)
from pliant.anatomy.null import Null
from pliant.anatomy.probe import answer, evaluating, probe

__all__ = [
    "Anatomy",
    "Attribute",
    "Axis",
    "Block",
    "Null",
    "Weight",
    "anatomy_of",
    "answer",
    "blocks_of",
    "described_by",
    "evaluating",
    "global_size",
    "layers_of",
    "plain_config",
    "probe",
]
