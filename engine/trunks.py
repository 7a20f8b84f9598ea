"""What a pass leaves in the store for later passes of a request, and what it finds there of earlier ones.

Owns the way of trunks' rows between the stream and the store: keys and values as a layer's attention gets them, before
anything is done to them, and the hidden states behind a layer, before anything is written to them. A fork of a trunk
has the bits that it would have beside it, since what is kept are the same tensors' rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.copies import to_device
from engine.decoding import Decoding
from engine.growth import Growth
from engine.spans import SpanStore
from engine.streams import Stream, Streams
from scheduling.plan import Segment

# T = packed rows, R = rows of trunks, G = key/value heads, C = head dimension, D = hidden


class Trunks:
    """The trunks of one pass on one shard."""

    def __init__(self, streams: Streams, store: SpanStore) -> None:
        self._streams = streams
        self._store = store
        self._keeps = streams.plan.keeps
        self._growths: dict[int, Growth] = {}  # by id of the stream
        store.hold(streams.plan.grows)

    def decoding(self, stream: Stream) -> Decoding | None:
        """The rows that decode among those inside of a layer; None when none does."""
        if not self._streams.decoded:
            return None
        return Decoding(stream, self._streams.decoded.values(), self._store.caches, self._streams.device)

    def gathering(self, stream: Stream, also: frozenset[int] | None) -> tuple[Stream, list[int]]:
        """As `Streams.gathering`; None: no segment decodes."""
        if also is None:
            return stream, self._streams.trunks
        return self._streams.gathering(stream, also)

    def through(self, layer: int, places: Sequence[int], key_GTC: Tensor, value_GTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the stream, behind them those of some trunks."""
        segments = [self._streams.plan.segments[place] for place in places]
        found = [self.kept(one, layer, key_GTC.dtype) for one in segments if one.starts[layer] < one.stops[layer]]
        if found:
            key_GTC = torch.cat([key_GTC, *(key for key, _ in found)], 1)
            value_GTC = torch.cat([value_GTC, *(value for _, value in found)], 1)
        return key_GTC, value_GTC

    def keep_keys(self, layer: int, key_GRC: Tensor, value_GRC: Tensor) -> None:
        """Keeps the keys and values that later passes want; puts what caches take in where it belongs."""
        stream = self._streams.inside(layer)
        for keep in self._keeps:
            if keep.stops[layer]:
                rows = self._rows(stream, keep.segment, 0, keep.stops[layer])
                self._store.keep_keys(keep.trunk, layer, key_GRC.index_select(1, rows), value_GRC.index_select(1, rows))
        self._grow(stream, layer, key_GRC, value_GRC)

    def kept(self, segment: Segment, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A trunk's keys and values `[G, R, C]`, as many as it has by its segment."""
        assert segment.trunk is not None
        count = segment.stops[layer] - segment.starts[layer]
        if segment.trunk in self._store.caches:
            key, value = self._store.caches.rows(segment.trunk, layer, count)
            return key.to(dtype), value.to(dtype)  # back to what it was
        key, value = self._store.kept_keys(segment.trunk, layer)
        return key[:, :count], value[:, :count]

    def _grow(self, stream: Stream, layer: int, key_GRC: Tensor, value_GRC: Tensor) -> None:
        if not self._streams.plan.grows:
            return
        if id(stream) not in self._growths:
            plan, caches = self._streams.plan, self._store.caches
            self._growths[id(stream)] = Growth(stream, plan.grows, caches, self._streams.device)
        self._growths[id(stream)].put(layer, key_GRC, value_GRC)

    def outputs(self, layer: int) -> Tensor | None:
        """`[R, D]`: the hidden states behind a layer that trunks have, trunk after trunk; None when none has any."""
        found = [self._store.kept_output(trunk, layer) for trunk, count in self._streams.outputs(layer) if count]
        return torch.cat(found) if found else None

    def keep_outputs(self, layer: int, hidden_1TD: Tensor) -> None:
        """Keeps the hidden states behind a layer that later passes want."""
        for keep in self._keeps:
            start, stop = keep.outputs[layer], keep.stops[layer]
            if start < stop:
                rows = self._rows(self._streams.layer(layer), keep.segment, start, stop)
                if self._streams.giving:
                    rows = self._streams.among_outputs(layer, rows)
                self._store.keep_output(keep.trunk, layer, self.take(layer, hidden_1TD, rows)[0])

    def take(self, layer: int, hidden_1TD: Tensor, rows: Tensor) -> Tensor:
        """`[1, rows, D]` of the hidden states behind a layer; rows behind the stream's are those of `outputs`."""
        outputs = self.outputs(layer) if self._streams.giving else None
        if outputs is not None:
            hidden_1TD = torch.cat([hidden_1TD, outputs[None]], 1)
        return hidden_1TD.index_select(1, rows)

    def _rows(self, stream: Stream, segment: int, start: int, stop: int) -> Tensor:
        runs = stream.runs(segment, start, stop)
        return to_device(torch.cat([torch.arange(*run) for run in runs]), self._streams.device)
