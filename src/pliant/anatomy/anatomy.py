"""The anatomy of one model: its residual blocks, where they were read from, and which of them must stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pliant.anatomy.block import Axis, Block
from pliant.architecture import Architecture, BlockSpec
from pliant.errors import ArchitectureError

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Traced:
    """The source of an anatomy that was read from the operations of a model, without an architecture file.

    Attributes:
        name: the model's ``model_type``, or its class.
    """

    name: str


@dataclass(frozen=True)
class Anatomy:
    """The blocks and axes of a model.

    Attributes:
        source: the architecture file it was read with, or the trace.
        blocks: its blocks by name, in the order in which they run. Removed blocks are left out.
        depth: number of layers, including those whose blocks were all removed.
        layer_types: the type of each layer (``full_attention``, ``sliding_attention``, ``conv``).
        rest: parameters outside every block: embeddings, output head, final norm.
        head: multiply-accumulates per token of the output head.
    """

    source: Architecture | Traced
    blocks: Mapping[str, Block]
    depth: int
    layer_types: tuple[str, ...]
    rest: int
    head: int

    @property
    def traced(self) -> bool:
        """Whether it was read from the operations of the model, without an architecture file."""
        return isinstance(self.source, Traced)

    @property
    def architecture(self) -> Architecture:
        """The architecture file it was read with.

        Raises:
            ArchitectureError: the model was traced.
        """
        if isinstance(self.source, Traced):
            raise ArchitectureError(f"{self.source.name} was traced, so it has no architecture file")
        return self.source

    @property
    def axes(self) -> dict[str, Axis]:
        """Every axis whose width can be chosen, by full name. If several blocks share one, its name does not begin with
        the name of a removable one of them."""
        return {axis.name: axis for block in self.blocks.values() for axis in block.leaders}

    def specs(self, layer: int) -> tuple[BlockSpec, ...]:
        """The blocks that a layer has in the dense model; empty for a traced model."""
        return () if isinstance(self.source, Traced) else self.source.blocks_of(self.layer_types[layer])

    def removed(self) -> list[str]:
        """The names of the blocks that the dense model has and this one lacks."""
        names = [f"layers.{layer}.{spec.kind}" for layer in range(self.depth) for spec in self.specs(layer)]
        return [name for name in names if name not in self.blocks]

    def removed_with(self, skip: Collection[str]) -> frozenset[str]:
        """The blocks in ``skip`` and those inside them, which have no effect without them."""
        return frozenset(
            block.name
            for block in self.blocks.values()
            if block.name in skip or any(name in skip for name in self.outside(block))
        )

    def outside(self, block: Block) -> tuple[str, ...]:
        """The blocks that a block is inside of, from the innermost."""
        if block.spec.inside is None:
            return ()
        return tuple(f"layers.{block.layer}.{kind}" for kind in self.architecture.inside(block.kind))

    def coupled(self) -> dict[str, frozenset[str]]:
        """Block -> names that it has in common with the blocks on which its saving depends: those that share its
        tensors, and those that are inside the same block."""
        return {
            block.name: frozenset((*self.outside(block)[-1:], *([f"tied.{block.tied}"] if block.tied else [])))
            for block in self.blocks.values()
        }

    def alive(self, skip: Collection[str] = NONE) -> list[Block]:
        """The blocks except those in ``skip`` and those inside them."""
        removed = self.removed_with(skip)
        return [block for block in self.blocks.values() if block.name not in removed]

    def holders(self, skip: Collection[str] = NONE) -> dict[tuple[tuple[str, ...], str], list[Block]]:
        """(state, layer type) -> the blocks that keep it, except those in ``skip``, in running order.

        A model counts the tokens it has seen in one of them, so the last one must stay.
        """
        holders: dict[tuple[tuple[str, ...], str], list[Block]] = {}
        for block in self.alive(skip):
            if block.spec.state:
                holders.setdefault((block.spec.state, self.layer_types[block.layer]), []).append(block)
        return holders

    def may_go(self, skip: Collection[str] = NONE, roles: Collection[str] | None = None) -> list[Block]:
        """The blocks any one of which may be removed next, after those in ``skip``.

        Arguments:
            roles: only blocks of these roles; None for all.
        """
        only = {blocks[0].name for blocks in self.holders(skip).values() if len(blocks) == 1}
        return [
            block
            for block in self.alive(skip)
            if block.removable and block.name not in only and (roles is None or block.role in roles)
        ]

    def may_all_go(self) -> list[Block]:
        """The blocks that may all be removed at once: the last holder of each state stays."""
        last = {blocks[-1].name for blocks in self.holders().values()}
        return [block for block in self.blocks.values() if block.removable and block.name not in last]

    def axes_of(self, roles: Collection[str]) -> list[str]:
        """The short names of the axes that blocks of these roles are cut along."""
        return sorted({axis.leader for block in self.blocks.values() if block.role in roles for axis in block.leaders})


def counted_once(blocks: Iterable[Block]) -> Iterator[tuple[Block, bool]]:
    """Each block, and whether its tied tensors count: tensors that blocks share count only for the first of them."""
    seen = set()
    for block in blocks:
        yield block, block.tied not in seen
        if block.tied is not None:
            seen.add(block.tied)
