"""What a pass puts into caches at a layer: one copy a slab, however many sequences grow.

Worked out once for a level's rows, and used by every layer that has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches import Cache, Caches, Slab
from engine.copies import row_index, to_device
from engine.streams import Stream
from scheduling.plan import Grow

# R = rows of the stream, and of trunks behind it; N = of these, those that go into a slab; G, S, P, C as in
# `engine.caches`


class Growth:
    """Rows of a level, and where in the caches they go."""

    def __init__(self, stream: Stream, grows: Sequence[Grow], caches: Caches, device: torch.device) -> None:
        self._caches = caches
        found: dict[int, tuple[Slab, list[tuple[Cache, int]], list[int]]] = {}  # caches and positions; rows
        for grow in grows:
            if grow.start >= grow.stop or stream.level in stream.segments[grow.segment].skips:
                continue  # none are new to it, or rows have neither keys nor values here
            cache = caches.of(grow.trunk)
            _, places, rows = found.setdefault(id(cache.slab), (cache.slab, [], []))
            for first, stop in stream.runs(grow.segment, grow.start, grow.stop):
                rows.extend(range(first, stop))
            places.extend((cache, position - cache.begin) for position in range(grow.start, grow.stop))
        self._parts = [_Part(slab, places, rows, device) for slab, places, rows in found.values()]

    def put(self, layer: int, key_GRC: Tensor, value_GRC: Tensor) -> None:
        for part in self._parts:
            part.put(self._caches, layer, key_GRC, value_GRC)


class _Part:
    """What goes into one slab."""

    def __init__(self, slab: Slab, places: list[tuple[Cache, int]], rows: list[int], device: torch.device) -> None:
        self._slab, self._device = slab, device
        self._slots = [cache.slot for cache, _ in places]
        self._positions = [position for _, position in places]
        self._rows = row_index(rows, device)
        self._indices: dict[int, Tensor] = {}  # by G

    def put(self, caches: Caches, layer: int, key_GRC: Tensor, value_GRC: Tensor) -> None:
        held = caches.layer(self._slab, layer, key_GRC, value_GRC)
        index = self._index(key_GRC.shape[0])
        for slots, rows_GRC in ((held.keys_SGPC, key_GRC), (held.values_SGPU, value_GRC)):
            taken = self._taken(rows_GRC.transpose(0, 1)).to(slots.dtype)  # as models leave it in memory
            slots.view(-1, slots.shape[3]).index_copy_(0, index, taken.reshape(-1, slots.shape[3]))
        if self._device.type == "cpu" and not math.isfinite(float(taken.sum())):
            is_odd = ~torch.isfinite(taken).all(2).all(1)
            held.odd.update(slot for slot, odd in zip(self._slots, is_odd.tolist(), strict=True) if odd)

    def _taken(self, rows_RGC: Tensor) -> Tensor:
        return rows_RGC[self._rows] if isinstance(self._rows, slice) else rows_RGC.index_select(0, self._rows)

    def _index(self, num_groups: int) -> Tensor:
        """`[N G]`: flat places among slots, groups and positions."""
        if num_groups not in self._indices:
            slots, positions = torch.tensor(self._slots)[:, None], torch.tensor(self._positions)[:, None]
            heads = slots * num_groups + torch.arange(num_groups)
            self._indices[num_groups] = to_device((heads * self._slab.capacity + positions).flatten(), self._device)
        return self._indices[num_groups]
