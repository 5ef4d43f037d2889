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
    """Choices that are made one by one: each block present or gone, each axis at one of its sizes.

    Nothing is assumed about what an axis is: channels, heads, the rank of an adapter and the size of a kernel are alike. What is
    kept inside a block that is gone does not matter.

    Attributes:
        blocks: blocks that may be gone.
        axes: (name of an axis, sizes that it may have), the whole size first, then smaller ones.
        stay: sets of blocks of which one must stay.
        base: what is gone or narrower in all of them.
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
            groups: short name of an axis (``channels``, ``kv``) -> units that come and go together; other axes are left alone.
            blocks: blocks that may be gone. The last holder of each state stays.
            base: blocks that are gone already.
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
        """How many choices there are in each place: 2 for a block, the number of its sizes for an axis."""
        return (2,) * len(self.blocks) + tuple(len(sizes) for _, sizes in self.axes)

    def encode(self, subnet: Subnet) -> tuple[int, ...]:
        """A sub-network of this space as one integer per choice; 0 is whole."""
        kept = dict(subnet.keep)
        gone = tuple(int(block in subnet.skip) for block in self.blocks)
        return gone + tuple(sizes.index(kept.get(name, sizes[0])) for name, sizes in self.axes)

    def decode(self, places: Sequence[int]) -> Subnet:
        """The inverse of :meth:`encode`."""
        subnet = self.base
        for (name, sizes), place in zip(self.axes, places[len(self.blocks) :], strict=True):
            if place:
                subnet = subnet.keeping(name, sizes[int(place)])
        return subnet.without(*(block for block, gone in zip(self.blocks, places, strict=False) if gone))

    def allows(self, subnet: Subnet) -> bool:
        """Whether enough blocks stay."""
        return not any(needed <= subnet.skip for needed in self.stay)

    def neighbours(self, subnet: Subnet) -> list[Subnet]:
        """Sub-networks that differ in one choice, by one step."""
        places, found = self.encode(subnet), []
        for i, (place, count) in enumerate(zip(places, self.counts, strict=True)):
            for other in (place - 1, place + 1):
                if 0 <= other < count:
                    found.append(self.decode((*places[:i], other, *places[i + 1 :])))
        return [one for one in dict.fromkeys(found) if one != subnet and self.allows(one)]

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
        """Random choices made smaller, step by step, until there is enough of it or nothing is left to make smaller."""
        places, subnet = [0] * len(self.counts), self.base
        while not enough(subnet):
            free = [i for i, place in enumerate(places) if place + 1 < self.counts[i]]
            free = [i for i in free if i >= len(self.blocks) or self.allows(subnet.without(self.blocks[i]))]
            if not free:
                break
            places[int(draw.choice(free))] += 1
            subnet = self.decode(places)
        return subnet


def _sizes(axis: Axis, group: int) -> tuple[int, ...]:
    """The numbers of units that can be kept, from all of them down."""
    allowed = [axis.size]
    while (left := axis.less(allowed[-1], group)) is not None:
        allowed.append(left)
    return tuple(allowed)
