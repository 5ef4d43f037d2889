"""MultiPruner: remove blocks, then MLP channels, then attention heads, each up to its share of the ratio.

Muñoz et al., "MultiPruner: Balanced Structure Removal in Foundation Models", 2025 (arXiv 2501.09949).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet, ratio, validate
from pliant.errors import DataError, SubnetError
from pliant.search import WidthPruner, block_moves, width_moves
from pliant.search.moves import pooled
from pliant.search.order import ordered
from pliant.step import Job, StepError


@dataclass(frozen=True, kw_only=True)
class MultiPruner(WidthPruner):
    """Three greedy stages from coarse to fine. Units are put in order of importance first, so that a stage always takes
    the least important ones left."""

    kind: ClassVar[str] = "multipruner"

    split: str = "44:52:4"
    """How the ratio is shared among blocks, MLP channels and attention heads (paper, table 7)."""

    width_samples: int = 128
    """Rows of calibration text for the two width stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares()
        self._check_counts(width_samples=1)

    def shares(self) -> tuple[float, float, float]:
        """The split as three shares that sum to 1.

        Raises:
            StepError: unless it is three numbers, none negative, not all zero.
        """
        try:
            blocks, channels, heads = (float(part) for part in self.split.split(":"))
        except (AttributeError, ValueError):
            raise StepError(f"split is blocks:channels:heads, e.g. 44:52:4, not {self.split!r}") from None
        total = blocks + channels + heads
        if min(blocks, channels, heads) < 0 or not 0 < total < float("inf"):
            raise StepError(f"the shares in split cannot be negative or all zero, they are {self.split!r}")
        return blocks / total, channels / total, heads / total

    def run(self, job: Job) -> None:
        pruning = self.begin(job)
        anatomy = pruning.anatomy
        blocks, channels, heads = self.shares()
        stages = [
            ("blocks", blocks, block_moves(anatomy)),
            ("mlp channels", channels, width_moves(anatomy, self.mlp_groups(job))),
            ("attention heads", heads, width_moves(anatomy, self.head_groups(anatomy))),
        ]
        # a layout may forbid a kind altogether; the others then take its share
        possible = [(name, share, moves) for name, share, moves in stages if share > 0 and moves(Subnet())]
        shared = sum(share for _, share, _ in possible)
        wanted = [(name, share / shared, moves) for name, share, moves in possible]
        self.check_reach(anatomy, [moves for _, _, moves in wanted])
        # the paper draws the sample for the widths first
        for_widths = self.windows(job, self.width_samples, self.seed)
        for_blocks = self.windows(job, self.samples, self.seed + 1)
        with ordered(job, anatomy, self.order, for_widths):
            until = 0.0
            for name, share, moves in wanted:
                until += self.ratio * share
                last = name == wanted[-1][0]
                windows = for_blocks if name == "blocks" else for_widths
                self.stage(pruning, name, moves, windows, self.ratio if last else until)
            if ratio(anatomy, pruning.subnet) < self.ratio - 1e-12:  # the last one ran dry: whatever earlier ones left
                left = pooled(*(moves for _, _, moves in wanted))
                self.stage(pruning, "what is left", left, for_widths, self.ratio)
            self.finish(pruning, job)


def read_config(path: str | Path, anatomy: Anatomy) -> Subnet:
    """A sub-network from a file: ours (``{"skip": [...], "keep": {...}}``), or what the original MultiPruner or BlockPruner
    code found.

    Of those it understands ``pruning_config.json`` of MultiPruner (``pruned_attn_idx``, ``pruned_mlp_idx``, ``pruned_attn_width``,
    ``pruned_mlp_width``) and the removal lists of BlockPruner (``{"1": [["mha", 25]], "2": …}``: the longest is taken).
    MultiPruner's widths count channels after reordering by L1 norm: reorder the model first.

    Raises:
        DataError: neither form, or a width that is no whole number of units.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{str(path)!r} is no pruning configuration: an object is expected")
    return parse_config(raw, anatomy, str(path))


def parse_config(raw: Mapping[str, Any], anatomy: Anatomy, where: str = "the configuration") -> Subnet:
    """:func:`read_config` for what is already read."""
    try:
        digits = bool(raw) and all(key.isdigit() for key in raw)
        if {"skip", "keep"} & set(raw):
            subnet = Subnet.from_dict(raw)
        else:
            subnet = _removals(raw) if digits else _widths(raw, anatomy)
        validate(subnet, anatomy)
    except SubnetError as error:
        raise DataError(f"{where} does not fit this model: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is no pruning configuration: {type(error).__name__} {error}") from None
    return subnet


def _removals(raw: Mapping[str, Any]) -> Subnet:
    """BlockPruner: removals by their number; sets are nested, so the longest is the whole run."""
    kinds = {"mha": "attention", "mlp": "mlp"}
    longest = raw[max(raw, key=int)]
    return Subnet(frozenset(f"layers.{int(layer)}.{kinds[kind]}" for kind, layer in longest))


def _widths(raw: Mapping[str, Any], anatomy: Anatomy) -> Subnet:
    """MultiPruner: removed layers of each kind, and widths in channels of those that stay."""
    keys = {"pruned_attn_idx", "pruned_mlp_idx", "pruned_attn_width", "pruned_mlp_width"}
    if not keys & set(raw):
        raise ValueError(f"expected are {', '.join(sorted(keys))}")
    subnet = Subnet()
    for kind, index in (("attention", "pruned_attn_idx"), ("mlp", "pruned_mlp_idx")):
        for layer in raw.get(index) or ():
            subnet = subnet.without(f"layers.{int(layer)}.{kind}")
    for kind, widths in (("attention", "pruned_attn_width"), ("mlp", "pruned_mlp_width")):
        for layer, width in (raw.get(widths) or {}).items():
            block = anatomy.blocks.get(f"layers.{int(layer)}.{kind}")
            if block is None:
                raise SubnetError(f"it narrows {kind} of layer {layer}, which is not there")
            if len(block.leaders) != 1:
                raise SubnetError(f"{block.name} of this family has {len(block.leaders)} axes to cut, not one width")
            (leader,) = block.leaders
            widest = max(axis.ratio * axis.unit for axis in block.axes.values() if axis.leader == leader.leader)
            units, left = divmod(int(width), widest)
            if left:
                raise SubnetError(f"width {width} of {block.name} is no multiple of {widest}")
            if block.name not in subnet.skip and units != leader.size:
                subnet = subnet.keeping(leader.name, units)
    return subnet
