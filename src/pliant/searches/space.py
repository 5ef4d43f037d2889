"""Space: the sub-networks that a search may choose from."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pliant.anatomy import Anatomy, Axis
from pliant.elastic import Subnet


@dataclass(frozen=True)
class Space:
    """Independent choices: each block is present or removed, each axis has one of its sizes.

    An axis may be of any kind: channels, heads, the rank of an adapter, the size of a kernel. Sizes inside a removed
    block have no effect.

    Attributes:
        blocks: blocks that may be removed.
        axes: (name of an axis, sizes that it may have), the full size first, then smaller ones.
        stay: sets of blocks; at least one block of each set stays.
        base: the cuts that all sub-networks share.
    """

    blocks: tuple[str, ...] = ()
    axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    stay: tuple[frozenset[str], ...] = ()
    base: Subnet = Subnet()

    @classmethod
    def of(
        cls, anatomy: Anatomy, groups: Mapping[str, int], blocks: Sequence[str] = (), base: Subnet = Subnet()
    ) -> Self:
        """The space of a model.

        Arguments:
            groups: short name of an axis (``channels``, ``kv``) -> units that are removed together; other axes are
                units alone.
            blocks: blocks that may be removed. The last holder of each state stays.
            base: the cuts that all sub-networks share.
        """
        alive = anatomy.alive(base.skip)
        axes = {axis.name: axis for block in alive for axis in block.leaders if axis.leader in groups}
        return cls(
            tuple(block.name for block in alive if block.name in set(blocks)),
            tuple((name, _sizes(axis, groups[axis.leader])) for name, axis in axes.items()),
            tuple(frozenset(block.name for block in holders) for holders in anatomy.holders(base.skip).values()),
            base,
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of options of each choice: 2 for a block, the number of sizes for an axis."""
        return (2,) * len(self.blocks) + tuple(len(sizes) for _, sizes in self.axes)

    def encode(self, subnet: Subnet) -> tuple[int, ...]:
        """A sub-network of this space as one integer per choice; 0 is the full size or a block that is present."""
        keep = dict(subnet.keep)
        removed = tuple(int(block in subnet.skip) for block in self.blocks)
        return removed + tuple(sizes.index(keep.get(name, sizes[0])) for name, sizes in self.axes)

    def decode(self, choices: Sequence[int]) -> Subnet:
        """The inverse of :meth:`encode`."""
        subnet = self.base
        for (name, sizes), index in zip(self.axes, choices[len(self.blocks) :], strict=True):
            if index:
                subnet = subnet.keeping(name, sizes[int(index)])
        return subnet.without(*(block for block, removed in zip(self.blocks, choices, strict=False) if removed))

    def allows(self, subnet: Subnet) -> bool:
        """Whether a block of every set in :attr:`stay` stays."""
        return not any(blocks <= subnet.skip for blocks in self.stay)

    def neighbours(self, subnet: Subnet) -> list[Subnet]:
        """Sub-networks that differ in one choice, by one step."""
        choices, near = self.encode(subnet), []
        for i, (choice, count) in enumerate(zip(choices, self.counts, strict=True)):
            for other in (choice - 1, choice + 1):
                if 0 <= other < count:
                    near.append(self.decode((*choices[:i], other, *choices[i + 1 :])))
        return [other for other in dict.fromkeys(near) if other != subnet and self.allows(other)]

    def neighbour(self, subnet: Subnet, draw: random.Random) -> Subnet | None:
        """One of the neighbours at random; None if there is none."""
        near = self.neighbours(subnet)
        return draw.choice(near) if near else None

    def sample(self, draw: random.Random) -> Subnet:
        """A sub-network with every choice drawn at random."""
        while not self.allows(subnet := self.decode([draw.randrange(count) for count in self.counts])):
            pass
        return subnet

    def shrunk(self, enough: Callable[[Subnet], bool], draw: random.Random | np.random.Generator) -> Subnet:
        """Shrink random choices step by step until ``enough(subnet)`` is true or nothing can shrink further."""
        choices, subnet = [0] * len(self.counts), self.base
        while not enough(subnet):
            free = [i for i, choice in enumerate(choices) if choice + 1 < self.counts[i]]
            free = [i for i in free if i >= len(self.blocks) or self.allows(subnet.without(self.blocks[i]))]
            if not free:
                break
            choices[int(draw.choice(free))] += 1
            subnet = self.decode(choices)
        return subnet


def _sizes(axis: Axis, group: int) -> tuple[int, ...]:
    """The numbers of units that can be kept, from all of them down."""
    allowed = [axis.size]
    while (units := axis.less(allowed[-1], group)) is not None:
        allowed.append(units)
    return tuple(allowed)
