"""Where every row of a pass lies, level by level, worked out from the plan's segments.

A level is a decoder layer, and one more behind the last one. At each, the stream is the own rows of all segments, one
after another, and zeros up to a number of rows that the kernels want. Between two levels rows die and forks are born:
one gather makes a level's rows from those of the level before. Every shard computes the same from the same plan.

Rows of trunks, which an earlier pass left in the store, are not in the stream. Whoever looks for them gets numbers
behind the stream's rows: as many as a trunk has at the level, trunk after trunk. Those come first that have outputs of
layers, from which rows are born; last those that only rows read which find them where they lie (`engine.decoding`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import lt

import torch
from torch import Tensor

from engine.copies import to_device
from engine.decoded import DecodedRow, decoded_rows, joined_trunks
from scheduling.plan import MIN_ROWS, NO_ROWS, Plan, Segment, TrunkId, View

# T = rows of a level, padded


class LevelRows(ABC):
    """The rows of one level: own rows of each segment, one segment after another."""

    def __init__(
        self, segments: Sequence[Segment], level: int, multiple: int, trunks: Sequence[int] | None = None
    ) -> None:
        """`trunks` are the places of those, in the order of their rows; None: as the segments are."""
        self.segments = segments
        self.level = level
        self.starts = [segment.starts[level] for segment in segments]
        self.bases: list[int] = []  # row of each segment's first own row
        self.num_rows = 0  # without padding
        for segment in range(len(segments)):
            self.bases.append(self.num_rows)
            self.num_rows += len(self.own(segment))
        self.num_padded = padded(self.num_rows, multiple)
        self.num_reachable = self.num_padded  # with what trunks have
        for place in trunks_of(segments) if trunks is None else trunks:
            one = segments[place]
            if level < len(one.stops):
                self.bases[place] = self.num_reachable
                self.num_reachable += max(0, one.stops[level] - one.starts[level])

    @abstractmethod
    def own(self, segment: int) -> Sequence[int]:
        """Positions of a segment's own rows, ascending."""

    def row(self, segment: int, position: int) -> int | None:
        """The row of a position in a segment or in what it forks from, None where it does not run."""
        owner = self.owner(segment, position)
        if owner is None or self.segments[owner].trunk is not None:
            return None
        return self._own_row(owner, position)

    def owner(self, segment: int, position: int) -> int | None:
        """The segment itself, or the nearest that it forks from, which has a position."""
        owner: int | None = segment
        while owner is not None and position < self.starts[owner]:
            owner = self.segments[owner].parent
        return owner

    @abstractmethod
    def _own_row(self, segment: int, position: int) -> int | None:
        """The row of a position that is the segment's own, None where it has ended."""


class Stream(LevelRows):
    """The rows of a layer: of each segment the positions from one to another."""

    def own(self, segment: int) -> range:
        if self.segments[segment].trunk is not None:
            return range(0)
        return range(self.starts[segment], max(self.starts[segment], self.segments[segment].stops[self.level]))

    def runs(self, segment: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows of the positions from `start` to `stop`, which must be there: (first row, behind the last), in order."""
        found: list[tuple[int, int]] = []
        for owner, first, last in self.owners(segment, start, stop):
            base = self.bases[owner] - self.starts[owner]
            found.append((base + first, base + last))
        found.reverse()
        return found

    def owners(self, segment: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Who has the positions from `start` to `stop`, which must be there: (segment, first, behind the last).

        The last positions come first: those of the segment itself, then those of what it forks from.
        """
        owner: int | None = segment
        while start < stop:
            assert owner is not None, "a root begins at position 0"
            first = max(start, self.starts[owner])
            if first < stop:
                assert stop <= self.segments[owner].stops[self.level], "a row that somebody needs has ended"
                yield owner, first, stop
                stop = first
            owner = self.segments[owner].parent

    def _own_row(self, segment: int, position: int) -> int | None:
        is_live = position < self.segments[segment].stops[self.level]
        return self.bases[segment] + position - self.starts[segment] if is_live else None


class RunningStream(Stream):
    """The rows that a layer is run for: those of its level without the ones that go around it."""

    def own(self, segment: int) -> range:
        return range(0) if self.level in self.segments[segment].skips else super().own(segment)

    def _own_row(self, segment: int, position: int) -> int | None:
        return None if self.level in self.segments[segment].skips else super()._own_row(segment, position)


class HeadStream(LevelRows):
    """The rows behind the last layer: of each segment chosen positions."""

    def own(self, segment: int) -> Sequence[int]:
        return self.segments[segment].head

    def _own_row(self, segment: int, position: int) -> int | None:
        head = self.segments[segment].head
        place = bisect_left(head, position)
        return self.bases[segment] + place if place < len(head) and head[place] == position else None


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
        self.decoded = decoded_rows(plan)
        self.giving = trunks_of(plan.segments, has_outputs=True)  # from whose outputs rows are born
        self.trunks, self.num_gathered = self._in_order(self.decoded)  # of the trunks, those whose rows are gathered
        self._layers: list[Stream] = []
        self._running: dict[int, Stream] = {}
        self._origins: dict[int, Tensor | None] = {}  # by id of the stream

    @cached_property
    def running(self) -> dict[int, int]:
        """Segments that have rows in this pass, and their places among these."""
        places = [place for place, segment in enumerate(self.plan.segments) if segment.trunk is None]
        return {segment: place for place, segment in enumerate(places)}

    def _in_order(self, decoded: Mapping[int, DecodedRow]) -> tuple[list[int], int]:
        """The trunks in the order of their rows: those first that somebody looks for who does not decode; how many."""
        others, joined = trunks_of(self.plan.segments, has_outputs=False), joined_trunks(self.plan, decoded)
        gathered = [*self.giving, *(place for place in others if place in joined)]
        return [*gathered, *(place for place in others if place not in joined)], len(gathered)

    def gathering(self, stream: Stream, also: frozenset[int]) -> tuple[Stream, list[int]]:
        """A layer's rows with numbers for those of trunks that are gathered behind them, and which trunks these are.

        `also` are segments that decode at other layers, and not at this one.
        """
        if not also:
            return stream, self.trunks[: self.num_gathered]
        order, count = self._in_order({place: row for place, row in self.decoded.items() if place not in also})
        return type(stream)(self.plan.segments, stream.level, self.multiple, order), order[:count]

    def at(self, level: int) -> LevelRows:
        """The rows at a level; the same object as at the level before when nothing changes there."""
        return self.head if level == self.num_layers else self.layer(level)

    def layer(self, level: int) -> Stream:
        """The rows at a layer."""
        for missing in range(len(self._layers), level + 1):
            is_same = missing > 0 and missing not in self._changes
            stream = self._layers[-1] if is_same else Stream(self.plan.segments, missing, self.multiple, self.trunks)
            self._layers.append(stream)
        return self._layers[level]

    @cached_property
    def _changes(self) -> frozenset[int]:
        """Layers whose rows are not those of the layer before."""
        bounds = {bound for segment in self.plan.segments for bound in (segment.starts, segment.stops)}
        return frozenset(
            level
            for bound in bounds
            if bound and bound.count(bound[0]) < len(bound)
            for level in range(1, len(bound))
            if bound[level] != bound[level - 1]
        )

    def inside(self, level: int) -> Stream:
        """The rows inside of a layer; the same object as the layer's when none goes around it."""
        if level not in self._running:
            is_skipped = level in self._skipped
            self._running[level] = (
                RunningStream(self.plan.segments, level, self.multiple, self.trunks)
                if is_skipped
                else self.layer(level)
            )
        return self._running[level]

    @cached_property
    def _skipped(self) -> frozenset[int]:
        """Layers that some rows go around."""
        return frozenset(level for segment in self.plan.segments for level in segment.skips)

    def ways_around(self, level: int) -> tuple[Tensor, int] | None:
        """`[T inside]`: the layer's row that each row inside of it is, and how many of these are no padding.

        None when all rows run the layer.
        """
        here, running = self.layer(level), self.inside(level)
        if running is here:
            return None
        rows = _rows_in(here, running) + [0] * (running.num_padded - running.num_rows)
        return to_device(rows, self.device, torch.long), running.num_rows

    @cached_property
    def head(self) -> HeadStream:
        """The rows behind the last layer."""
        head = HeadStream(self.plan.segments, self.num_layers, self.multiple)
        if self.is_fixed:
            head.num_padded = head.num_reachable = max(head.num_padded, self._num_needed)
        return head

    @property
    def num_root_rows(self) -> int:
        """Rows that the root's forward is called with: of level 0, of trunks that give, and more where it insists."""
        return max(self._num_needed, self.head.num_padded) if self.is_fixed else self._num_needed

    @cached_property
    def _num_needed(self) -> int:
        """Rows of the root that give all others their tokens and positions: forks have those of their trunks."""
        first = self.layer(0)
        if not self.giving:
            return first.num_padded
        last = self.plan.segments[self.giving[-1]]
        return padded(first.bases[self.giving[-1]] + last.stops[0] - last.starts[0], self.multiple)

    def tokens(self) -> list[int]:
        """Token of each row of the root, those of level 0 first; pads 0."""
        own = (token for segment in self.plan.segments if segment.trunk is None for token in segment.tokens)
        return self._of_root(own, (token for place in self.giving for token in self.plan.segments[place].tokens))

    def positions(self) -> list[int]:
        """Position of each row of the root, as if its sequence ran alone; pads 0."""
        first = self.layer(0)
        own = (position for segment in range(len(first.segments)) for position in first.own(segment))
        given = (self.plan.segments[place] for place in self.giving)
        kept = (position for segment in given for position in range(segment.starts[0], segment.stops[0]))
        return self._of_root(own, kept)

    def _of_root(self, own: Iterable[int], kept: Iterable[int]) -> list[int]:
        """A number for each row of the root."""
        found = list(own)
        found += [0] * (self.layer(0).num_padded - len(found))
        found.extend(kept)
        return found + [0] * (self.num_root_rows - len(found))

    def births(self, level: int) -> Tensor | None:
        """`[T]`: which row of the level before each row of a level comes from; None when all stay where they are.

        Rows from the level before's padded number on are those of `outputs(level - 1)`.
        """
        before, after = self.layer(level - 1), self.at(level)
        if before is after:
            return None
        found = _rows_in(before, after) + [0] * (after.num_padded - after.num_rows)
        rows = to_device(found, self.device, torch.long)
        return self.among_outputs(level - 1, rows) if self.giving else rows

    def outputs(self, layer: int) -> list[tuple[TrunkId, int]]:
        """The trunks that have outputs of a layer, and how many."""
        found = []
        for place in self.giving:
            segment = self.plan.segments[place]
            assert segment.trunk is not None
            found.append((segment.trunk, max(0, segment.stops[layer] - segment.outputs[layer])))
        return found

    def output_row(self, layer: int, segment: int, position: int) -> int | None:
        """The row of a layer's output of a position, as `among_outputs` counts; None where there is none."""
        here = self.layer(layer)
        owner = here.owner(segment, position)
        if owner not in self.giving:
            return here.row(segment, position)
        first = here.num_padded
        for place, (_, count) in zip(self.giving, self.outputs(layer), strict=True):
            if place == owner:
                offset = position - self.plan.segments[place].outputs[layer]
                return first + offset if 0 <= offset < count else None
            first += count
        return None

    def among_outputs(self, layer: int, rows: Tensor) -> Tensor:
        """Rows of a layer, those of trunks renumbered: which of the outputs that trunks have, behind the stream's."""
        here = self.layer(layer)
        renumbered = rows.clone()
        first = here.num_padded
        for place, (_, count) in zip(self.giving, self.outputs(layer), strict=True):
            segment, base = self.plan.segments[place], here.bases[place]
            is_its = (rows >= base) & (rows < base + segment.stops[layer])
            renumbered += is_its * (first - base - segment.outputs[layer])
            first += count
        return renumbered

    def origins(self, level: int) -> Tensor | None:
        """`[T]`: the root's row that has the token and position of each row; None where they are the same rows."""
        here = self.layer(level)
        if id(here) not in self._origins:  # layers between which nothing changes have one stream
            self._origins[id(here)] = self._find_origins(here)
        return self._origins[id(here)]

    def _find_origins(self, here: Stream) -> Tensor | None:
        first = self.layer(0)
        if first is here:
            is_cut = self.num_root_rows > first.num_padded  # also where only trunks have more
            return torch.arange(first.num_padded, device=self.device) if is_cut else None
        rows = _rows_in(first, here) + [0] * (here.num_padded - here.num_rows)
        return to_device(rows, self.device, torch.long)

    @cached_property
    def kept(self) -> list[int]:
        """Rows behind the last layer that the head runs on, each once, ascending; without padding."""
        found: set[int] = set()
        for view in self.plan.views:
            for segment, positions in positions_of(view, view.kept_columns):
                for position in positions:
                    row = self.head.row(segment, position) if position >= 0 else None
                    if row is not None:
                        found.add(row)
        return sorted(found)

    def kept_rows(self) -> Tensor | None:
        """`[K]`: the kept rows, padded with row 0; None when nobody reads what the head makes."""
        if not self.kept:
            return None
        pads = padded(len(self.kept), self.multiple) - len(self.kept)
        return to_device(self.kept + [0] * pads, self.device)

    def kept_row(self, segment: int, position: int) -> int | None:
        """The place of a position's row among the kept ones, None when it is not kept."""
        row = self.head.row(segment, position)
        if row is None:
            return None
        place = bisect_left(self.kept, row)
        return place if place < len(self.kept) and self.kept[place] == row else None


def _rows_in(other: Stream, stream: LevelRows) -> list[int]:
    """For every row of a stream, the row of another that has its sequence and position."""
    rows: list[int] = []
    for segment in range(len(stream.segments)):
        own = stream.own(segment)
        if isinstance(own, range):
            for start, stop in other.runs(segment, own.start, own.stop):
                rows.extend(range(start, stop))
        else:
            for position in own:
                rows.extend(range(*other.runs(segment, position, position + 1)[0]))
    return rows


def padded(rows: int, multiple: int) -> int:
    """Rows to run for so many: enough that a row's bits do not depend on their number."""
    return -(-max(rows, MIN_ROWS) // multiple) * multiple


def positions_of(view: View, columns: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Per sequence of a view: its segment, and the positions that some columns of the view have there.

    Pads are below 0, and all columns of a sequence that has no rows.
    """
    longest = max(view.lengths)
    begins = view.begins or (0,) * len(view.lengths)
    for segment, length, begin in zip(view.segments, view.lengths, begins, strict=True):
        if segment == NO_ROWS:
            yield segment, [-1] * len(columns)
            continue
        first, shift = longest - length, begin + length - longest
        yield segment, [column + shift if column >= first else -1 for column in columns]


def trunks_of(segments: Sequence[Segment], *, has_outputs: bool | None = None) -> list[int]:
    """Places of the trunks; of those only that have outputs of layers, or only that have none, when that is said."""
    return [
        place
        for place, segment in enumerate(segments)
        if segment.trunk is not None and has_outputs in (None, any(map(lt, segment.outputs, segment.stops)))
    ]
