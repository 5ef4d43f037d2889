"""One residual block: its axes and every tensor slice that depends on an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from pliant.architecture import BlockSpec, Part
from pliant.runtime.packed_linear import Packed


@dataclass(frozen=True)
class Axis:
    """A dimension of one block that can shrink.

    Attributes:
        name: full name, e.g. ``layers.3.mlp.channels``.
        size: current number of units.
        unit: elements in one unit (1 for channels, ``head_dim`` for heads).
        leader: short name of the axis that it follows, or of itself.
        ratio: units of this axis for one unit of the leader (query heads per key-value head).
        config_key: the config.json key that holds the size; None if no key does.
        cut: whether a sub-network may choose its width.
        active: units that one token uses, so the fewest that can stay; None if a token uses all of them.
        multiple: a cut axis keeps a multiple of this many units.
        normed: a norm is taken over all units together, so cutting a unit differs from zeroing it.
        least: the fewest units that can stay, unless a token uses more.
        groups: number of equal groups that the units are in, one after another; every group keeps equally many, its
            first. Kept units are counted over all groups, those that are dropped included.
        copies: how often all units are repeated in a tensor dimension; all copies are cut alike.
        grouped_by: short name of the axis whose units are the groups; None if their number is fixed.
        copied_by: short name of the axis whose units have one copy each; None if their number is fixed.
        only_with: short name of the axis without whose units this one is gone; None if it does not depend on one.
    """

    name: str
    size: int
    unit: int
    leader: str
    ratio: int
    config_key: str | None
    cut: bool = True
    active: int | None = None
    multiple: int = 1
    normed: bool = False
    least: int = 1
    groups: int = 1
    copies: int = 1
    grouped_by: str | None = None
    copied_by: str | None = None
    only_with: str | None = None

    @property
    def fewest(self) -> int:
        """The fewest units that can stay; every group keeps as many as one token uses, because it may use those."""
        return max((self.active or 0) * self.groups, self.least)

    def allows(self, units: int) -> bool:
        """Whether this number of units can be kept."""
        return units == self.size or (self.fewest <= units < self.size and units % self.multiple == 0)

    def less(self, units: int, group: int) -> int | None:
        """The units that remain of ``units`` after at least ``group`` are removed; None if that is not allowed."""
        remaining = (units - group) // self.multiple * self.multiple
        return remaining if self.allows(remaining) else None


@dataclass(frozen=True)
class Weight:
    """One parameter of a block and the axes its dimensions live on.

    Attributes:
        path: its path inside the layer, e.g. ``self_attn.q_proj.weight``.
        dims: for each tensor dimension, its stretches in order.
        reads: for the matrix of a linear layer, the tensor dimension that runs over its inputs; None for other tensors.
            A matrix costs one multiply-accumulate per element and token that uses it.
        uses: how often one token (or image) uses it: a convolution once per position of its output.
        buffer: it is a buffer, such as the running mean of a batch norm, and not a parameter.
        depthwise: it is the weight of a depthwise convolution: not a matrix, but each element is multiplied once per
            token.
        called: its linear layer is called. If not, the block reads the weight itself.
        rescaled: for the weight of a norm over an axis, whether it is taken over the ``width`` or over each ``group``.
            It grows as the axis narrows, so that cutting equals zeroing. None for other tensors.
        tied: it is shared with the blocks that its block is tied to.
        skips: it alone remains of a scan once this axis has no units; None for other weights.
        alone: its value in that case, of its full shape; None if it stays as it is.
    """

    path: str
    dims: tuple[tuple[Part, ...], ...]
    reads: int | None = None
    uses: int = 1
    buffer: bool = False
    depthwise: bool = False
    called: bool = True
    rescaled: str | None = None
    tied: bool = False
    skips: str | None = None
    alone: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def identity(self, layer: nn.Module) -> int:
        """A number that is equal for two weights exactly if they are the same tensor."""
        holder = layer.get_submodule(self.path.rpartition(".")[0])
        return id(holder if isinstance(holder, Packed) else self.tensor(layer))

    def tensor(self, layer: nn.Module) -> torch.Tensor:
        """The parameter or buffer itself; for a packed layer, a tensor of its shape on the meta device."""
        owner, _, name = self.path.rpartition(".")
        holder = layer.get_submodule(owner)
        if isinstance(holder, Packed):
            shape = (holder.out_features, holder.in_features)
            return torch.empty(shape if name == "weight" else shape[:1], device="meta")
        return layer.get_buffer(self.path) if self.buffer else layer.get_parameter(self.path)


@dataclass(frozen=True)
class Attribute:
    """A plain attribute that must follow an axis: ``out_features`` of a linear layer, ``num_heads`` of an attention.

    Attributes:
        path: the module inside the layer; ``config.x`` as ``name`` means x of the config that this module reads.
        parts: the stretches whose sum it holds.
        measure: what it holds of each: ``width`` in elements, number of ``units``, or width of one ``group``.
        epsilon: for the epsilon of a norm over this measure, its value at full width: it is divided by the share of
            elements that are kept, unless none are. None for other attributes.
    """

    path: str
    name: str
    parts: tuple[Part, ...]
    measure: str = "width"
    epsilon: float | None = None


@dataclass(frozen=True)
class Block:
    """One residual block, ``x + f(norm(x))``, that can be removed whole or made narrower.

    Attributes:
        name: full name, e.g. ``layers.3.attention``.
        layer: index of the layer it is in.
        axes: its axes by short name; only leaders can be chosen, the others follow.
        fixed: sizes of the dimensions that do not change.
        removed: the other modules that are removed with the block: its norms, and all modules of f but the last.
        norm_parameters: parameters of those norms.
        removable: False for a block that the model needs: a stem, a classifier.
        cached: heads that one token adds to the cache, if they are not those of its axis.
        tied: the name of the first of the blocks that share its tensors, all or some; None if it shares none.
        norms_tied: its norms are shared with these blocks, too.
        unused: modules inside its modules that hold tensors which only the blocks tied to it use.
    """

    name: str
    layer: int
    spec: BlockSpec
    axes: Mapping[str, Axis]
    fixed: Mapping[str, int]
    weights: tuple[Weight, ...]
    attributes: tuple[Attribute, ...]
    removed: tuple[str, ...]
    norm_parameters: int
    removable: bool = True
    cached: int | None = None
    tied: str | None = None
    norms_tied: bool = False
    unused: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def role(self) -> str:
        """The kind of block: attention, mlp, experts, conv, scan or other."""
        return self.spec.role

    @property
    def leaders(self) -> tuple[Axis, ...]:
        """The axes whose width can be chosen."""
        return tuple(axis for short, axis in self.axes.items() if axis.leader == short and axis.cut)

    @property
    def reading(self) -> tuple[Weight, ...]:
        """The matrices whose inputs are units of the block and nothing else: ``down_proj`` reads channels, ``o_proj``
        heads."""
        return tuple(
            weight
            for weight in self.weights
            if weight.reads is not None
            and len(weight.dims) == 2
            and all(part.axis in self.axes for part in weight.dims[weight.reads])
        )

    @property
    def state_axis(self) -> Axis | None:
        """The axis that spans the state of a scan and that no matrix reads; None if the block has none."""
        read = {leader for weight in self.reading for leader in self.leaders_of(weight.dims[weight.reads or 0])}
        unread = [axis for axis in self.leaders if axis.leader in self.spec.scan_state and axis.leader not in read]
        return unread[0] if len(unread) == 1 else None

    def units(self, part: Part, kept: Mapping[str, int]) -> int:
        """Units of ``part.axis`` if ``kept[leader]`` units are kept of each leader; a missing leader is full."""
        axis = self.axes[part.axis]
        if axis.only_with is not None and self._kept(axis.only_with, kept) == 0:
            return 0
        in_all = axis.ratio * self._kept(axis.leader, kept)
        return in_all if axis.grouped_by is None else in_all // axis.groups * self._kept(axis.grouped_by, kept)

    def _kept(self, leader: str, kept: Mapping[str, int]) -> int:
        return kept.get(leader, self.axes[leader].size)

    def pieces(self, part: Part, kept: Mapping[str, int]) -> tuple[int, int, int]:
        """The stretch that ``part`` covers: its copies, the groups in each, and the elements of one group."""
        if part.axis in self.fixed:
            return 1, 1, self.fixed[part.axis] * part.factor
        axis = self.axes[part.axis]
        copies = axis.copies if axis.copied_by is None else self._kept(axis.copied_by, kept)
        groups = axis.groups if axis.grouped_by is None else self._kept(axis.grouped_by, kept)
        return copies, groups, self.units(part, kept) // groups * axis.unit * part.factor

    def width(self, part: Part, kept: Mapping[str, int]) -> int:
        """Elements of a tensor dimension that ``part`` covers."""
        return prod(self.pieces(part, kept))

    def by_leader(self, part: Part) -> tuple[tuple[str | None, int], ...]:
        """The full stretch of ``part``: its copies, the groups in each, the units of its leader in each group, and the
        elements of one unit. Each number comes with the leading axis that determines it, or None."""
        copies, groups, elements = self.pieces(part, {})
        axis = self.axes[part.axis]
        units = self.axes[axis.leader].size // groups
        return (
            (axis.copied_by, copies),
            (axis.grouped_by, groups),
            (axis.leader, units),
            (None, elements // max(1, units)),
        )

    def leaders_of(self, dim: Sequence[Part]) -> set[str]:
        """The leading axes that a tensor dimension depends on, by short name."""
        numbers = (number for part in dim if part.axis in self.axes for number in self.by_leader(part))
        return {leader for leader, _ in numbers if leader is not None}

    def measured(self, parts: Sequence[Part], measure: str, kept: Mapping[str, int]) -> int:
        """The ``units``, the ``width`` in elements, or the width of one ``group`` of a few stretches in all."""
        if measure == "units":
            return sum(self.units(part, kept) for part in parts)
        return sum(self.pieces(part, kept)[2] if measure == "group" else self.width(part, kept) for part in parts)

    def value(self, attribute: Attribute, kept: Mapping[str, int]) -> float:
        """Value of a plain attribute if ``kept`` units are kept."""
        now = self.measured(attribute.parts, attribute.measure, kept)
        if attribute.epsilon is None:
            return now
        full = self.measured(attribute.parts, attribute.measure, {})
        return attribute.epsilon if now in (0, full) else attribute.epsilon * full / now

    def shape(self, weight: Weight, kept: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a parameter if ``kept`` units are kept."""
        return tuple(sum(self.width(part, kept) for part in dim) for dim in weight.dims)

    def active(self, weight: Weight, kept: Mapping[str, int]) -> int:
        """Elements of a parameter that one token uses: all, except in a stack of one matrix per expert."""
        experts = self.axes.get(weight.dims[0][0].axis) if len(weight.dims) == 3 else None
        if experts is not None and experts.active is not None:
            return prod(self.shape(weight, kept)[1:]) * experts.active
        return prod(self.shape(weight, kept))

    def conv_state(self, kept: Mapping[str, int]) -> int:
        """Elements that its convolution keeps between tokens: the last inputs of each channel, as many as the kernel
        reads."""
        convolutions = (weight for weight in self.weights if weight.depthwise and "conv" in self.spec.state)
        return sum(prod(self.shape(weight, kept)) for weight in convolutions)

    def scan_state(self, kept: Mapping[str, int]) -> int:
        """Elements that its scan keeps between tokens; 0 without a scan. The copies of an axis are not counted."""
        if not self.spec.scan_state:
            return 0
        return prod(
            self.fixed[axis] if axis in self.fixed else self.units(Part(axis), kept) * self.axes[axis].unit
            for axis in self.spec.scan_state
        )

    def parameters(self, kept: Mapping[str, int], *, tied: bool = True) -> int:
        """Parameters of the block and its norms.

        Arguments:
            tied: count those that it shares with other blocks.
        """
        norms = 0 if self.norms_tied and not tied else self.norm_parameters
        counted = (weight for weight in self.weights if not weight.buffer and (tied or not weight.tied))
        return norms + sum(prod(self.shape(weight, kept)) for weight in counted)
