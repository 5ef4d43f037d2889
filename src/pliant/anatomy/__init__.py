"""What a model is made of: blocks in order, and the axes that tie their tensors together."""

from pliant.anatomy.anatomy import (
    Anatomy,
    anatomy_of,
    blocks_of,
    described_by,
    global_size,
    layers_of,
    plain_config,
)
from pliant.anatomy.block import Attribute, Axis, Block, Weight
from pliant.anatomy.null import Null
from pliant.anatomy.probe import agree, answer, evaluating, probe, rounding

__all__ = [
    "Anatomy",
    "Attribute",
    "Axis",
    "Block",
    "Null",
    "Weight",
    "agree",
    "anatomy_of",
    "answer",
    "blocks_of",
    "described_by",
    "evaluating",
    "global_size",
    "layers_of",
    "plain_config",
    "probe",
    "rounding",
]
