"""Which query rows are computed together, and against which pages of keys: tiles and chunks of a level.

Keys are taken in *pages* of `PAGE` positions counted from position 0 (as in paged attention; Kwon et al., SOSP 2023).
Whole pages of a parent are read where they are, however many forks look at them; only the page in which a fork begins
is copied for it. Segments of like geometry over one prefix are one *chunk* and go through the kernels together. A call
of a kernel costs as much as some rows do, so what differs a little is made alike: shorter tiles repeat their last row,
and where few forks look at a parent its pages are copied for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from engine.copies import to_device
from engine.streams import Stream
from scheduling.plan import PAGE

# B = tiles of a chunk, Q = query rows of each, P = columns of the prefix, O = columns of a tile's own pages, W = P + O

# A page is also what element-wise kernels take at a time, so that no tail falls on a row's end.
TILE = 128  # most query rows of a tile; longer segments are cut at multiples of it

# What the kernel calls of one more chunk cost, measured on one core with 256 to 1024 features:
_CHUNK_SCORES = 1024  # in rows x columns that are computed for nothing
_CHUNK_COPIES = 512  # in columns of keys and values that are copied


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some rows of one segment: positions from `start` to `stop`."""

    segment: int
    row: int  # of its first position
    start: int
    stop: int
    own: tuple[tuple[int, int], ...]  # rows of the positions from its first page's begin to `stop`


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What tiles have in common that are computed together."""

    prefix: tuple[tuple[int, int], ...]  # rows of all positions before the tiles' first page
    num_pages: int  # from the tiles' first page to their last

    @property
    def num_columns(self) -> int:
        """Positions that a row is held against."""
        return sum(stop - start for start, stop in self.prefix) + self.num_pages * PAGE


class Chunk:
    """Tiles of one geometry, and the indices that they need. Made once a level, used by every layer that has it."""

    def __init__(self, geometry: Geometry, tiles: list[Tile], device: torch.device) -> None:
        self.geometry = geometry
        self.tiles = tiles
        self.num_rows = max(tile.stop - tile.start for tile in tiles)  # of each: shorter ones repeat their last row
        self.device = device
        self.prefix_columns = sum(stop - start for start, stop in geometry.prefix)
        self.own_columns = geometry.num_pages * PAGE
        self._parts: dict[int, list[Chunk]] = {}
        self._hidden: dict[int | None, tuple[Tensor | None, Tensor]] = {}  # by window

    def of(self, tiles: list[Tile]) -> Chunk | None:
        """Some of its tiles, None when these are none."""
        if len(tiles) == len(self.tiles):
            return self
        return Chunk(self.geometry, tiles, self.device) if tiles else None

    def parts(self, most: int) -> list[Chunk]:
        """The chunk in parts of at most so many tiles."""
        if most >= len(self.tiles):
            return [self]
        if most not in self._parts:
            starts = range(0, len(self.tiles), most)
            self._parts[most] = [Chunk(self.geometry, self.tiles[i : i + most], self.device) for i in starts]
        return self._parts[most]

    @cached_property
    def rows(self) -> slice | Tensor:
        """The stream's rows of the tiles' queries, tile after tile."""
        num, first = self.num_rows, self.tiles[0].row
        is_run = all(
            tile.row == first + place * num and tile.stop - tile.start == num for place, tile in enumerate(self.tiles)
        )
        if is_run:
            return slice(first, first + len(self.tiles) * num)
        starts, lasts = torch.tensor([(tile.row, tile.row + tile.stop - tile.start - 1) for tile in self.tiles]).T
        rows = torch.minimum(starts[:, None] + torch.arange(num), lasts[:, None]).flatten()
        return to_device(rows, self.device)

    @cached_property
    def own_rows(self) -> slice | Tensor:
        """`[B O]` rows of the tiles' own pages; what lies behind a end repeats the last row, and nobody sees it."""
        if len(self.tiles) == 1 and len(self.tiles[0].own) == 1:
            ((start, stop),) = self.tiles[0].own
            if stop - start == self.own_columns:
                return slice(start, stop)
        rows: list[int] = []
        for place, tile in enumerate(self.tiles, 1):
            for start, stop in tile.own:
                rows.extend(range(start, stop))
            rows.extend([rows[-1]] * (place * self.own_columns - len(rows)))
        return to_device(rows, self.device)

    def hidden(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Columns a row does not see: `[B, Q, 1, P]` of the prefix (None: it sees all), `[B, Q, 1, O]` of its own."""
        if window not in self._hidden:
            starts, lasts = torch.tensor([(tile.start, tile.stop - 1) for tile in self.tiles]).T
            position = torch.minimum(starts[:, None] + torch.arange(self.num_rows), lasts[:, None])[:, :, None, None]
            own = torch.arange(self.prefix_columns, self.prefix_columns + self.own_columns)
            prefix = None
            out = own > position
            if window is not None:
                out |= position - own >= window
                if self.prefix_columns and max(tile.stop for tile in self.tiles) > window:
                    prefix = to_device(position - torch.arange(self.prefix_columns) >= window, self.device)
            self._hidden[window] = prefix, to_device(out, self.device)
        return self._hidden[window]


def chunks_of(stream: Stream, device: torch.device, without: Collection[int] = ()) -> Iterator[Chunk]:
    """All tiles of a level, those of like geometry together; none of the segments `without`."""
    groups: dict[Geometry, list[Tile]] = {}
    for geometry, tile in _tiles_of(stream, without):
        groups.setdefault(geometry, []).append(tile)
    for geometry, tiles in _with_copied_prefixes(stream, groups).items():
        for alike in _of_like_length(geometry, tiles):
            yield Chunk(geometry, alike, device)


def _tiles_of(stream: Stream, without: Collection[int]) -> Iterator[tuple[Geometry, Tile]]:
    for segment in range(len(stream.segments)):
        if segment in without:
            continue
        own = stream.own(segment)
        start = own.start
        while start < own.stop:
            stop = min(own.stop, (start // TILE + 1) * TILE)
            page = start - start % PAGE
            geometry = Geometry(prefix=tuple(stream.runs(segment, 0, page)), num_pages=-(-(stop - page) // PAGE))
            row = stream.bases[segment] + start - own.start
            tile = Tile(segment=segment, row=row, start=start, stop=stop, own=tuple(stream.runs(segment, page, stop)))
            yield geometry, tile
            start = stop


def _with_copied_prefixes(stream: Stream, groups: dict[Geometry, list[Tile]]) -> dict[Geometry, list[Tile]]:
    """The groups, those over different prefixes joined where it costs less to copy their few prefixes' pages."""
    small: dict[Geometry, list[Geometry]] = {}  # without prefix -> those that it may stand for
    for geometry, tiles in groups.items():
        if geometry.prefix and len(tiles) * geometry.num_columns <= _CHUNK_COPIES:
            whole = Geometry(prefix=(), num_pages=geometry.num_columns // PAGE)
            small.setdefault(whole, []).append(geometry)
    for whole, parts in small.items():
        if len(parts) > 1 or whole in groups:
            joined = groups.setdefault(whole, [])
            for geometry in parts:
                joined.extend(
                    replace(tile, own=tuple(stream.runs(tile.segment, 0, tile.stop))) for tile in groups.pop(geometry)
                )
    return groups


def _of_like_length(geometry: Geometry, tiles: list[Tile]) -> Iterator[list[Tile]]:
    """Tiles that go together, longest first: the shorter ones where their padding costs less than a chunk."""
    by_length: dict[int, list[Tile]] = {}
    for tile in tiles:
        by_length.setdefault(tile.stop - tile.start, []).append(tile)
    longest, alike = 0, list[Tile]()
    for length in sorted(by_length, reverse=True):
        own = by_length[length]
        if alike and (longest - length) * len(own) * geometry.num_columns > _CHUNK_SCORES:
            yield alike
            alike = []
        longest = longest if alike else length
        alike.extend(own)
    yield alike
