"""Groups of channels in tensor dimensions, merged when two dimensions must keep the same channels.

Every dimension of every tensor is either of no interest (``None``: a batch, a height) or a sequence of stretches.
"""

from __future__ import annotations

from typing import NamedTuple


class Stretch(NamedTuple):
    """A stretch of a dimension: ``factor`` elements side by side for each channel of a group."""

    group: int
    factor: int = 1


Dim = tuple[Stretch, ...] | None
Dims = tuple[Dim, ...]


class Groups:
    """Groups of channels, merged when they prove to be the same (union-find).

    Attributes:
        sizes: channels of each group.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._made_of: dict[int, tuple[Stretch, ...]] = {}  # a group that equals another, or several side by side
        self._fixed: set[int] = set()
        self._normed: set[int] = set()

    def new(self, size: int) -> tuple[Stretch, ...]:
        """A dimension of ``size`` channels, in a new group."""
        self.sizes.append(size)
        return (Stretch(len(self.sizes) - 1),)

    def resolve(self, dim: Dim) -> tuple[Stretch, ...]:
        """The same dimension in groups that do not consist of others."""
        resolved: list[Stretch] = []
        for stretch in dim or ():
            if stretch.group in self._made_of:
                own = self._made_of[stretch.group] = self.resolve(self._made_of[stretch.group])
                resolved += [Stretch(inner.group, inner.factor * stretch.factor) for inner in own]
            else:
                resolved.append(stretch)
        return tuple(resolved)

    def fix(self, *dims: Dim) -> None:
        """Mark dimensions that must not be cut."""
        self._fixed.update(stretch.group for dim in dims for stretch in self.resolve(dim))

    def norm(self, dim: Dim) -> None:
        """Mark channels over which a norm is taken together."""
        self._normed.update(stretch.group for stretch in self.resolve(dim))

    def is_fixed(self, group: int) -> bool:
        """Whether a group that does not consist of others must not be cut."""
        return group in self._fixed

    def is_normed(self, group: int) -> bool:
        return group in self._normed

    def same(self, one: Dim, other: Dim) -> Dim:
        """Make two dimensions keep the same channels; if their stretches do not match, fix both and return None."""
        if one is None or other is None:
            self.fix(one, other)
            return None
        one, other = self.resolve(one), self.resolve(other)
        if [(self.sizes[s.group], s.factor) for s in one] == [(self.sizes[s.group], s.factor) for s in other]:
            for a, b in zip(one, other, strict=True):
                if self.resolve((a,)) != self.resolve((b,)):
                    self._is(self.resolve((b,))[0].group, (Stretch(self.resolve((a,))[0].group),))
            return one
        for whole, parts in ((other, one), (one, other)):
            if len(whole) == 1 and whole[0].factor == 1 and whole[0].group not in {part.group for part in parts}:
                self._is(whole[0].group, parts)
                return parts
        self.fix(one, other)
        return None

    def _is(self, group: int, dim: tuple[Stretch, ...]) -> None:
        self._made_of[group] = dim
        if group in self._fixed:
            self.fix(dim)
        if group in self._normed:
            self.norm(dim)
