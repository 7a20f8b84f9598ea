"""Where a kernel finds the keys of each tile of queries: whole numbers, worked out on the host once a level.

A *tile* is some rows of one segment. Its keys are those of all positions up to its last one: from where its segment
begins they lie one behind another in the stream, just before the tile's own rows; before that they are rows of what the
segment forks from, in a table that all forks of one parent share (as blocks of a paged cache are found through a
table; Kwon et al., SOSP 2023). Everything goes to the device in one copy that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.copies import to_device
from engine.streams import Stream

Ints = NDArray[np.int32]

# What a tile is, in this order: row of its first query; that query's position; number of queries; the position from
# which on keys are the segment's own; where in the numbers the row of position 0 stands.
TILE_NUMBERS = 5


class KeyTables:
    """A level's tiles, by how many queries a tile has at most."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream = stream
        self._device = device
        self._made: dict[int, tuple[Tensor, int]] = {}

    def tiles(self, most: int) -> tuple[Tensor, int]:
        """`int32` on the device: the tiles, `TILE_NUMBERS` each, and behind them all tables; and how many tiles."""
        if most not in self._made:
            numbers, num_tiles = tile_numbers(self._stream, most)
            self._made[most] = to_device(torch.from_numpy(numbers), self._device), num_tiles
        return self._made[most]


def tile_numbers(stream: Stream, most: int) -> tuple[Ints, int]:
    """The tiles of a level, those with most keys first, with at most so many queries each; behind them the tables."""
    live = [place for place in range(len(stream.segments)) if len(stream.own(place))]
    starts, stops, bases = (
        np.array(numbers, dtype=np.int32)
        for numbers in (
            [stream.own(place).start for place in live],
            [stream.own(place).stop for place in live],
            [stream.bases[place] for place in live],
        )
    )
    counts = -(-(stops - starts) // most)
    num_tiles = int(counts.sum())
    table, offsets = _tables(stream, live, first=num_tiles * TILE_NUMBERS)
    of = np.repeat(np.arange(len(live)), counts)
    skipped = (np.arange(num_tiles) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    position = starts[of] + skipped
    number = np.minimum(stops[of] - position, most)
    tiles = np.stack([bases[of] + skipped, position, number, starts[of], offsets[of]], 1).astype(np.int32)
    tiles = tiles[np.argsort(-(position + number), kind="stable")]
    return np.concatenate([tiles.ravel(), table]), num_tiles


def _tables(stream: Stream, live: Iterable[int], first: int) -> tuple[Ints, Ints]:
    """Rows of what each parent has before its last fork, parent after parent; where each segment's parent begins."""
    parents = {place: stream.segments[place].parent for place in live}
    needed: dict[int, int] = {}  # positions by parent
    for place, parent in parents.items():
        if parent is not None:
            needed[parent] = max(needed.get(parent, 0), stream.own(place).start)
    begins: dict[int | None, int] = {None: 0}
    parts: list[Ints] = []
    for parent, stop in needed.items():
        begins[parent] = first
        parts.extend(np.arange(*run, dtype=np.int32) for run in stream.runs(parent, 0, stop))
        first += stop
    table = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    return table, np.array([begins[parent] for parent in parents.values()], dtype=np.int32)
