"""Points inside of attention: what visitors see of queries, keys, values, scores, patterns and what heads give.

Owns `Pairs`, the scores or the pattern of the rows that somebody asks for. A layer computes those apart from the
others, all at once, holds them while visitors look and write, and goes on with what they have become.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.copies import to_device
from polytrace.graph import Port

if TYPE_CHECKING:
    from engine.chunks import Chunk, Tile

# R = rows asked for, H = query heads, K = positions of keys; G, E, N, B, Q and W as in `engine.pages`

MASKED = {Port.SCORES: -torch.inf, Port.PATTERN: 0.0}  # what stands where a query sees no key


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Somebody's visit of one point of one module."""

    visit: Callable[[Any], Any]  # gets the point's value, returns what goes on
    rows: Collection[int]  # of the stream, whose scores or patterns are asked for; empty at other points


Points = dict[Port, Point]  # of one module


@dataclass(frozen=True, slots=True)
class Held:
    """Scores or patterns of a chunk's tiles."""

    chunk: Chunk
    values_GNW: Tensor


class Pairs:
    """Scores or patterns of some rows of one layer, `[R, H, K]` float32: rows of the stream, keys by their position."""

    def __init__(
        self,
        held: Sequence[Held],
        masked: float,
        num_groups: int,
        share: int,
        device: torch.device,
        sinks_GE: Tensor | None = None,
    ) -> None:
        self.held = held
        self.sinks_H = None if sinks_GE is None else sinks_GE.flatten()
        self.masked = masked
        self.num_groups, self.share, self.device = num_groups, share, device
        self.written: set[int] = set()  # rows
        self._places: dict[int, tuple[int, int, int, int]] = {}  # row -> part, tile, first and behind the last query
        for part, one in enumerate(held):
            for tile, own in enumerate(one.chunk.tiles):
                last = own.stop - own.start - 1
                for query in range(last + 1):  # shorter tiles repeat their last row
                    stop = one.chunk.num_rows if query == last else query + 1
                    self._places[own.row + query] = (part, tile, query, stop)

    def read(self, rows: Sequence[int], num_keys: int) -> Tensor:
        """What rows have for the keys at positions before `num_keys`, a copy."""
        shape = (len(rows), self.num_groups, self.share, num_keys)
        out_RGEK = torch.full(shape, self.masked, device=self.device)
        for part, places, tiles, queries in self._by_part(rows, is_repeated=False):
            values_GBQEW = self._grid(self.held[part])
            width = min(num_keys, values_GBQEW.shape[-1])
            taken_GREW = values_GBQEW[:, tiles, queries, :, :width]
            out_RGEK[places, :, :, :width] = taken_GREW.transpose(0, 1)
        return out_RGEK.flatten(1, 2)

    def write(self, rows: Sequence[int], values_RHK: Tensor) -> None:
        """Gives rows other values for the keys at positions before K; what a query does not see must be masked."""
        self.written.update(rows)
        for part, places, tiles, queries in self._by_part(rows, is_repeated=True):
            values_GBQEW = self._grid(self.held[part])
            width = min(values_RHK.shape[2], values_GBQEW.shape[-1])
            given_RGEK = values_RHK[places, :, :width].unflatten(1, (self.num_groups, self.share))
            values_GBQEW[:, tiles, queries, :, :width] = given_RGEK.transpose(0, 1)

    def _grid(self, held: Held) -> Tensor:
        """A part's values `[G, B, Q, E, W]`, the same memory."""
        grid: Tensor = held.values_GNW.unflatten(1, (len(held.chunk.tiles), held.chunk.num_rows, -1))
        return grid

    def _by_part(self, rows: Sequence[int], *, is_repeated: bool) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """Per part that has some of the rows: it, and for each of them its place among the rows, its tile and query."""
        found: dict[int, list[tuple[int, int, int]]] = {}
        for place, row in enumerate(rows):
            part, tile, query, stop = self._places[row]
            queries = range(query, stop) if is_repeated else (query,)
            found.setdefault(part, []).extend((place, tile, own) for own in queries)
        columns = {part: to_device(cells, self.device, torch.long).unbind(1) for part, cells in found.items()}
        return [(part, places, tiles, queries) for part, (places, tiles, queries) in columns.items()]


def apart(chunk: Chunk, rows: Sequence[int]) -> tuple[Chunk | None, Chunk | None]:
    """A chunk's tiles that have one of the rows (ascending), and the others."""

    def has_row(start: int, stop: int) -> bool:
        place = bisect_left(rows, start)
        return place < len(rows) and rows[place] < stop

    asked: list[Tile] = []
    others: list[Tile] = []
    for tile in chunk.tiles:
        (asked if has_row(tile.row, tile.row + tile.stop - tile.start) else others).append(tile)
    return chunk.of(asked), chunk.of(others)


def visited(points: Points, port: Port, value_1THC: Tensor) -> Tensor:
    """The value behind the visit of a point with heads; the same object where nobody replaced it."""
    point = points.get(port)
    after: Tensor = value_1THC if point is None else point.visit(value_1THC)
    return after


Watch = Callable[[nn.Module, Port, Tensor], None]
