"""Where every row of a pass lies, level by level, worked out from the plan's segments.

A level is a decoder layer, and one more behind the last one. At each, the stream is the own rows of all segments, one
after another, and zeros up to a number of rows that the kernels want. Between two levels rows die and forks are born:
one gather makes a level's rows from those of the level before. Every shard computes the same from the same plan.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from scheduling.plan import MIN_ROWS, Plan, Segment, View

# T = rows of a level, padded


class Stream:
    """The stream at one level."""

    def __init__(self, segments: Sequence[Segment], level: int, multiple: int) -> None:
        self.segments = segments
        self.level = level
        self.starts = [segment.starts[level] for segment in segments]
        self.bases: list[int] = []  # row of each segment's first own row
        rows = 0
        for start, stop in self._spans():
            self.bases.append(rows)
            rows += max(0, stop - start)
        self.num_rows = rows  # without padding
        self.num_padded = padded(rows, multiple)

    def _spans(self) -> Iterator[tuple[int, int]]:
        for start, segment in zip(self.starts, self.segments, strict=True):
            yield start, segment.stops[self.level]

    def own(self, segment: int) -> range:
        """Positions of a segment's own rows."""
        return range(self.starts[segment], max(self.starts[segment], self.segments[segment].stops[self.level]))

    def row(self, segment: int, position: int) -> int | None:
        """The row of a position in a segment or in what it forks from, None where it has ended."""
        owner: int | None = segment
        while owner is not None:
            if position >= self.starts[owner]:
                is_live = position < self.segments[owner].stops[self.level]
                return self.bases[owner] + position - self.starts[owner] if is_live else None
            owner = self.segments[owner].parent
        return None

    def runs(self, segment: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows of the positions from `start` to `stop`, which must be there: (first row, behind the last), in order."""
        found: list[tuple[int, int]] = []
        owner: int | None = segment
        while start < stop:
            assert owner is not None, "a root begins at position 0"
            first = max(start, self.starts[owner])
            if first < stop:
                base = self.bases[owner] - self.starts[owner]
                assert stop <= self.segments[owner].stops[self.level], "a row that somebody needs has ended"
                found.append((base + first, base + stop))
                stop = first
            owner = self.segments[owner].parent
        found.reverse()
        return found


class HeadStream(Stream):
    """The stream behind the last layer: chosen positions instead of all from one to another."""

    def __init__(self, segments: Sequence[Segment], level: int, multiple: int) -> None:
        self.segments = segments
        self.level = level
        self.starts = [segment.starts[level] for segment in segments]
        self.bases = []
        rows = 0
        for segment in segments:
            self.bases.append(rows)
            rows += len(segment.head)
        self.num_rows = rows
        self.num_padded = padded(rows, multiple)

    def row(self, segment: int, position: int) -> int | None:
        owner: int | None = segment
        while owner is not None and position < self.starts[owner]:
            owner = self.segments[owner].parent
        if owner is None:
            return None
        head = self.segments[owner].head
        place = bisect_left(head, position)
        return self.bases[owner] + place if place < len(head) and head[place] == position else None


class Streams:
    """All levels of one pass.

    A stream has a multiple of `multiple` rows. With `is_fixed` the root's forward insists on as many rows behind the
    layers as it was called with, so both have as many as the larger needs.
    """

    def __init__(self, plan: Plan, multiple: int, device: torch.device, *, is_fixed: bool) -> None:
        self.plan = plan
        self.multiple = multiple
        self.is_fixed = is_fixed
        self.device = device
        self.num_layers = len(plan.layer_rows)
        self._streams: list[Stream] = []

    def at(self, level: int) -> Stream:
        """The stream at a level; the same object as the level before when nothing changes there."""
        for missing in range(len(self._streams), level + 1):
            self._streams.append(self._make(missing))
        return self._streams[level]

    def _make(self, level: int) -> Stream:
        segments = self.plan.segments
        if level == self.num_layers:
            head = HeadStream(segments, level, self.multiple)
            if self.is_fixed:
                head.num_padded = max(head.num_padded, self._streams[0].num_padded)
            return head
        is_same = level > 0 and all(
            s.starts[level] == s.starts[level - 1] and s.stops[level] == s.stops[level - 1] for s in segments
        )
        if is_same:
            return self._streams[level - 1]
        return Stream(segments, level, self.multiple)

    @property
    def num_root_rows(self) -> int:
        """Rows that the root's forward is called with: those of level 0, and more where it insists."""
        first = self.at(0).num_padded
        return max(first, self.at(self.num_layers).num_padded) if self.is_fixed else first

    def tokens(self) -> list[int]:
        """Token of each row of the root, those of level 0 first; pads 0."""
        found = [token for segment in self.plan.segments for token in segment.tokens]
        return found + [0] * (self.num_root_rows - len(found))

    def positions(self) -> list[int]:
        """Position of each row of the root, as if its sequence ran alone; pads 0."""
        level = self.at(0)
        found = [position for segment in range(len(level.segments)) for position in level.own(segment)]
        return found + [0] * (self.num_root_rows - len(found))

    def births(self, level: int) -> Tensor | None:
        """`[T]`: which row of the level before each row of a level comes from; None when all stay where they are."""
        before, after = self.at(level - 1), self.at(level)
        if before is after:
            return None
        if isinstance(after, HeadStream):
            found = [
                before.runs(segment, position, position + 1)[0][0]
                for segment, own in enumerate(after.segments)
                for position in own.head
            ]
        else:
            found = _rows_in(before, after)
        return torch.tensor(found + [0] * (after.num_padded - after.num_rows), dtype=torch.long, device=self.device)

    def origins(self, level: int) -> Tensor | None:
        """`[T]`: the root's row that has the token and position of each row; None where they are the same rows."""
        first, here = self.at(0), self.at(level)
        if first is here:
            is_cut = self.num_root_rows > first.num_padded
            return torch.arange(first.num_padded, device=self.device) if is_cut else None
        rows = _rows_in(first, here) + [0] * (here.num_padded - here.num_rows)
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    @cached_property
    def kept(self) -> list[int]:
        """Rows behind the last layer that the head runs on, each once, ascending; without padding."""
        head = self.at(self.num_layers)
        found: set[int] = set()
        for view in self.plan.views:
            longest = max(view.lengths)
            for segment, length in zip(view.segments, view.lengths, strict=True):
                for column in view.kept_columns:
                    position = column - longest + length
                    row = head.row(segment, position) if position >= 0 else None
                    if row is not None:
                        found.add(row)
        return sorted(found)

    def kept_rows(self) -> Tensor | None:
        """`[K]`: the kept rows, padded with row 0; None when nobody reads what the head makes."""
        if not self.kept:
            return None
        pads = padded(len(self.kept), self.multiple) - len(self.kept)
        return torch.tensor(self.kept + [0] * pads, device=self.device)

    def kept_row(self, segment: int, position: int) -> int | None:
        """The place of a position's row among the kept ones, None when it is not kept."""
        row = self.at(self.num_layers).row(segment, position)
        if row is None:
            return None
        place = bisect_left(self.kept, row)
        return place if place < len(self.kept) and self.kept[place] == row else None


def _rows_in(other: Stream, stream: Stream) -> list[int]:
    """For every row of a stream, the row of another that has its sequence and position."""
    rows: list[int] = []
    for segment in range(len(stream.segments)):
        own = stream.own(segment)
        if own:
            for start, stop in other.runs(segment, own.start, own.stop):
                rows.extend(range(start, stop))
    return rows


def padded(rows: int, multiple: int) -> int:
    """Rows to run for so many: enough that a row's bits do not depend on their number."""
    return -(-max(rows, MIN_ROWS) // multiple) * multiple


def view_rows(view: View) -> Iterator[tuple[int, int, int]]:
    """(segment, length, pads) of each sequence of a view."""
    longest = max(view.lengths)
    for segment, length in zip(view.segments, view.lengths, strict=True):
        yield segment, length, longest - length
