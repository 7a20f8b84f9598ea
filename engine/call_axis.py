"""Where the calls lie in a tensor of several calls that run as one.

Calls are put together along the first dimension of their arguments; from there on, each operation moves them: a tensor
of `calls` calls has them along one dimension, of size `before * calls * inside`, each with the elements that it has
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Content(Enum):
    """What is known of a tensor that calls lie in."""

    OWN = "own"  # each call's follows from what the call is given
    SAME = "same"  # each call's is the same, whatever calls are given
    ARGUMENT = "argument"  # integers that calls are given, or which of them are not 0
    COUNT = "count"  # it counts from 0 along the calls' dimension, and is the same along others


@dataclass(frozen=True, slots=True)
class Along:
    """Calls lie along a dimension."""

    dim: int
    before: int
    inside: int
    content: Content = Content.OWN

    def to(self, dim: int) -> Along:
        """The same along another dimension."""
        return replace(self, dim=dim)

    def of(self, content: Content) -> Along:
        """The same of other content."""
        return replace(self, content=content)

    def is_at(self, other: Along) -> bool:
        """Whether calls lie alike."""
        return (self.dim, self.before, self.inside) == (other.dim, other.before, other.inside)

    def size(self, calls: int) -> int:
        """Of the dimension."""
        return self.before * calls * self.inside


class Same(Enum):
    """A tensor that is the same, whatever calls there are and whatever these are given."""

    FOR_ALL = "for all"


class Mixed(Enum):
    """A tensor of which nothing is known: what is a call's own of it cannot be told."""

    UP = "up"


@dataclass(frozen=True, slots=True)
class Total:
    """The number of elements that are true among all of these, of all calls: as many of each call, or all, or not."""

    elements: int


Place = Along | Same | Total | Mixed
SAME, MIXED = Same.FOR_ALL, Mixed.UP


def reshaped(along: Along, shape: Sequence[int], new: Sequence[int], calls: int) -> Place:
    """Where calls lie when the elements of a tensor, in their order, are given another shape.

    As one line the elements are `[outer, calls, inner]`; they stay along one dimension where one of the new ones holds
    that part of the line whole.
    """
    outer = math.prod(shape[: along.dim]) * along.before
    inner = math.prod(shape[along.dim + 1 :]) * along.inside
    reached = 1  # elements of the line's outermost part that the dimensions so far tell apart
    for dim, size in enumerate(new):
        if size and outer % reached == 0:
            before = outer // reached
            inside, rest = divmod(size, before * calls)
            if not rest and inside and inside * math.prod(new[dim + 1 :]) == inner:
                is_whole = along.content is not Content.COUNT or (before, inside) == (along.before, along.inside)
                return Along(dim, before, inside, along.content) if is_whole else MIXED
        reached *= size
    return MIXED


def alone(shape: Sequence[int], place: Place, calls: int) -> tuple[int, ...] | None:
    """The shape that a call has alone of a tensor; None where that cannot be told."""
    if isinstance(place, Mixed):
        return None
    sizes = list(shape)  # a total is a number
    if isinstance(place, Along):
        if place.dim >= len(sizes) or sizes[place.dim] != place.size(calls):
            return None
        sizes[place.dim] = place.before * place.inside
    return tuple(sizes)
