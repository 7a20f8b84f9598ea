"""How a request sees its rows: views of the packed stream shaped as if it ran alone.

Owns the way from packed rows `[1, T, *tail]` to `[sequences, columns, *tail]` and back, for one invoke of one member
at one level, or among the rows kept for the head. Rows may be the sequence's own or those of a segment that it forks
from; a view does not tell. Ragged sequences are left-padded with zeros, and what is written on pads vanishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from engine.copies import to_device
from engine.streams import LevelRows, Streams, positions_of
from scheduling.plan import NO_ROWS, View

# From (segment, position) to a row, None where there is none any more.
Finder = Callable[[int, int], int | None]


class RowView:
    """Some columns of one invoke in one row space of a pass."""

    def __init__(
        self, view: View, columns: Sequence[int], find: Finder, device: torch.device, num_stream: int | None = None
    ) -> None:
        """Rows from `num_stream` on are not in the stream: they are outputs of trunks."""
        self.view = view
        self.shape = (len(view.lengths), len(columns))
        self.device = device
        rows: list[int] = []
        cells: list[int] = []  # flat places in sequences x columns of those rows
        place = 0
        for segment, positions in positions_of(view, columns):
            for position in positions:
                row = find(segment, position) if position >= 0 else None
                if row is not None:
                    rows.append(row)
                    cells.append(place)
                place += 1
        self.num_rows = len(rows)
        self.numbers: Sequence[int] = rows  # of the stream, of the cells that have one
        self.places: Sequence[int] = cells  # flat places of those in `[sequences, columns]`
        self.is_whole = len(cells) == place  # every cell has a row
        self._num_stream = num_stream
        self.has_outputs = num_stream is not None and max(rows, default=0) >= num_stream
        is_run = self.is_whole and not self.has_outputs
        self.is_run = is_run and all(after - before == 1 for before, after in pairwise(rows))

    @classmethod
    def joined(cls, views: Sequence[RowView]) -> RowView:
        """Views of one shape in one row space, one below the other; none has outputs of trunks."""
        joined, (sequences, columns) = cls.__new__(cls), views[0].shape
        joined.shape = (sequences * len(views), columns)
        joined.device = views[0].device
        joined.numbers = [row for view in views for row in view.numbers]
        cells = sequences * columns
        joined.places = [place + number * cells for number, view in enumerate(views) for place in view.places]
        joined.num_rows = len(joined.numbers)
        joined.is_whole = all(view.is_whole for view in views)
        joined._num_stream, joined.has_outputs = None, False
        joined.is_run = joined.is_whole and all(after - before == 1 for before, after in pairwise(joined.numbers))
        return joined

    @cached_property
    def rows(self) -> Tensor:
        """Rows of the stream, `[real]`."""
        return to_device(self.numbers, self.device, torch.long)

    @cached_property
    def cells(self) -> Tensor:
        """Their flat places in `[sequences, columns]`, `[real]`."""
        return to_device(self.places, self.device, torch.long)

    def read(self, packed: Tensor, outputs: Tensor | None = None) -> Tensor:
        """`[sequences, columns, *tail]`: aliases `packed` when its rows lie one after another, else a copy.

        `outputs` are those of trunks, `[R, *tail]`.
        """
        if self.is_run:
            return packed[0, self.numbers[0] : self.numbers[-1] + 1].view(*self.shape, *packed.shape[2:])
        taken = self._with_outputs(packed, outputs) if self.has_outputs else packed[0].index_select(0, self.rows)
        if self.is_whole:
            return taken.view(*self.shape, *packed.shape[2:])
        out = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        return out.index_copy_(0, self.cells, taken).view(*self.shape, *packed.shape[2:])

    def _with_outputs(self, packed: Tensor, outputs: Tensor | None) -> Tensor:
        assert outputs is not None, "a trunk has the outputs that were planned for it"
        taken = packed.new_empty(self.num_rows, *packed.shape[2:])
        for source, (places, rows) in zip((packed[0], outputs), self._sources, strict=True):
            taken.index_copy_(0, places, source.index_select(0, rows))
        return taken

    @cached_property
    def _sources(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of the stream and of trunks' outputs: the places among `rows` that they have, and their rows there."""
        first = self._num_stream or 0
        stream = [(place, row) for place, row in enumerate(self.numbers) if row < first]
        kept = [(place, row - first) for place, row in enumerate(self.numbers) if row >= first]
        stream_T, kept_T = (to_device(found, self.device, torch.long).view(-1, 2).T for found in (stream, kept))
        return (stream_T[0], stream_T[1]), (kept_T[0], kept_T[1])

    def part(self, value: Tensor) -> Tensor:
        """The cells of a value of the view's shape that have rows, in their order: `[real, *tail]`."""
        flat = value.flatten(0, 1)
        return flat if self.is_whole else flat.index_select(0, self.cells)


class InvokeRows:
    """One invoke's views in a pass, each made once."""

    def __init__(self, view: View, streams: Streams) -> None:
        self.view = view
        self.streams = streams
        self._views: dict[tuple[int | None, tuple[int, ...] | None], RowView] = {}
        self._outputs: dict[tuple[int, tuple[int, ...] | None], RowView] = {}
        self.first_token = 0  # where its own begin among the next tokens of the pass

    def at(self, level: int, columns: tuple[int, ...] | None) -> RowView:
        """Columns (None: all) of the invoke at a level."""
        return self._of(level, columns)

    def inside(self, layer: int, columns: tuple[int, ...] | None) -> RowView:
        """Columns of the invoke among the rows that a layer is run for."""
        return self._in(self.streams.inside(layer), columns)

    def behind(self, layer: int, columns: tuple[int, ...] | None) -> RowView:
        """Columns of the invoke among the outputs of a layer, those of trunks included."""
        if not self.streams.giving:
            return self._of(layer, columns)
        key = layer, columns
        if key not in self._outputs:
            find = partial(self.streams.output_row, layer)
            num_stream = self.streams.layer(layer).num_padded
            self._outputs[key] = RowView(self.view, self._named(columns), find, self.streams.device, num_stream)
        return self._outputs[key]

    def kept(self, columns: tuple[int, ...] | None) -> RowView:
        """Columns of the invoke among the rows that the head runs on."""
        return self._of(None, columns)

    def tokens(self, columns: tuple[int, ...] | None) -> RowView:
        """Columns of the invoke among the next tokens of the pass: its last one has them, one for each sequence.

        Sequences that have a row of logits in common draw from it one by one.
        """
        view = self.view
        begins = view.begins or (0,) * len(view.lengths)
        own: list[int] = []
        ends: dict[int, int] = {}  # by token: the position behind which it comes
        for segment, begin, length in zip(view.segments, begins, view.lengths, strict=True):
            own.append(NO_ROWS if segment == NO_ROWS else self.first_token + len(ends))
            if segment != NO_ROWS:
                ends[own[-1]] = begin + length - 1

        def find(token: int, position: int) -> int | None:
            return token if position == ends[token] else None

        return RowView(replace(view, segments=tuple(own)), self._named(columns), find, self.streams.device)

    @cached_property
    def decoder(self) -> RowView:
        """The row that each sequence has in the decoder of a model that has an encoder."""
        places = self.streams.running
        view = replace(self.view, lengths=(1,) * len(self.view.lengths), begins=())
        return RowView(view, (0,), lambda segment, _position: places.get(segment), self.streams.device)

    def _of(self, level: int | None, columns: tuple[int, ...] | None) -> RowView:
        return self._in(self.streams.at(level) if level is not None else None, columns)

    def _in(self, found: LevelRows | None, columns: tuple[int, ...] | None) -> RowView:
        key = (None if found is None else id(found), columns)
        if key not in self._views:
            find = self.streams.kept_row if found is None else found.row
            self._views[key] = RowView(self.view, self._named(columns), find, self.streams.device)
        return self._views[key]

    def _named(self, columns: tuple[int, ...] | None) -> Sequence[int]:
        return range(max(self.view.lengths)) if columns is None else columns
