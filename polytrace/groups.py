"""An empty `tracer.invoke()`: all prompts of the trace so far as one left-padded view.

A value of the group is put together from what its members read, so it has every change that they made. What is written
to it is taken apart and written by each member: there is no run but theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polytrace.graph import Operand, Site
from polytrace.storage import Place, Storage


@dataclass(frozen=True, slots=True)
class Part:
    """What one member has of the group's view."""

    place: Place
    first: int  # of its sequences
    stop: int
    pads: int  # columns before its own

    def index(self, dims: Sequence[int]) -> tuple[slice, ...]:
        """Where it lies in a value of the group whose tokens are in these dimensions."""
        columns = [slice(self.pads, None) if dim in dims else slice(None) for dim in range(1, max(dims) + 1)]
        return (slice(self.first, self.stop), *columns)


@dataclass(slots=True, eq=False)
class GroupPlace:
    """A site and the members whose rows are meant. As `Place`, of which each member has one."""

    site: Site
    invoke: int  # below 0: no invoke of the request
    parts: tuple[Part, ...]
    line: str = ""
    writer: Storage | None = None
    in_place_refusal: str | None = None

    @property
    def writes(self) -> int:
        """Writes that were recorded there so far, by any of them."""
        return sum(part.place.writes for part in self.parts)

    def note(self, line: str, writer: Storage | None) -> None:
        """Takes in that each member has written."""
        self.line, self.writer = line, writer
        for part in self.parts:
            part.place.note(line, None)


def parts_of(places: Sequence[Place], lengths: Sequence[tuple[int, ...]]) -> tuple[Part, ...]:
    """The members' parts of a view as wide as the longest prompt of all."""
    longest = max(max(own) for own in lengths)
    parts, first = [], 0
    for place, own in zip(places, lengths, strict=True):
        parts.append(Part(place, first, first + len(own), longest - max(own)))
        first += len(own)
    return tuple(parts)


def index_from_the_end(index: Operand, shortest: int, longest: int) -> Operand | None:
    """An index that names columns which every member has, counted from the end, where all of them are the same.

    `shortest` is the width of the narrowest member, `longest` of the group. None for any other index.
    """
    if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
        return None
    columns = index[1]
    if type(columns) is int:
        back = columns if columns < 0 else columns - longest
        return (index[0], back, *index[2:]) if -shortest <= back < 0 else None
    if isinstance(columns, slice) and type(columns.start) is int and columns.stop is None and columns.step is None:
        back = columns.start if columns.start < 0 else columns.start - longest
        return (index[0], slice(back, None), *index[2:]) if -shortest <= back < 0 else None
    return None
