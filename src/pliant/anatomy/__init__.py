"""The parts of a model: its blocks in order, and the axes that tie their tensors together."""

from pliant.anatomy.anatomy import Anatomy, Traced, counted_once
from pliant.anatomy.block import Attribute, Axis, Block, Weight
from pliant.anatomy.config import (
    DENSE_LAYERS,
    entries_of,
    global_size,
    guard_keys,
    guards,
    is_cut,
    is_guard,
    known_keys,
    layer_config,
    layer_types_of,
    plain_config,
    text_config_of,
)
from pliant.anatomy.null import Null, NullNorm
from pliant.anatomy.probe import agree, evaluating, output_of, probe, rounding
from pliant.anatomy.read import anatomy_of, blocks_of, described_by, holders_of, layers_of

__all__ = [
    "DENSE_LAYERS",
    "Anatomy",
    "Attribute",
    "Axis",
    "Block",
    "Null",
    "NullNorm",
    "Traced",
    "Weight",
    "agree",
    "anatomy_of",
    "blocks_of",
    "counted_once",
    "described_by",
    "entries_of",
    "evaluating",
    "global_size",
    "guard_keys",
    "guards",
    "holders_of",
    "is_cut",
    "is_guard",
    "known_keys",
    "layer_config",
    "layer_types_of",
    "layers_of",
    "output_of",
    "plain_config",
    "probe",
    "rounding",
    "text_config_of",
]
