"""How many rows segments have at each layer: counted by stretches of layers, of which a segment has few."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import neg

from scheduling.plan import Segment


def rows_by_layer(segments: Iterable[Segment], num_layers: int) -> list[int]:
    """Rows that run in a pass, those that go around a layer included. Of trunks none do."""
    changes = [0] * (num_layers + 1)
    for segment in segments:
        if segment.trunk is None:
            for first, until, start, stop in stretches(segment, num_layers):
                changes[first] += stop - start
                changes[until] -= stop - start
    return list(accumulate(changes[:num_layers]))


def skipped_by_layer(segments: Iterable[Segment], num_layers: int) -> list[int]:
    """Of these, those that go around the layer."""
    found = [0] * num_layers
    for segment in segments:
        if segment.trunk is None:
            for layer in segment.skips:
                found[layer] += max(0, segment.stops[layer] - segment.starts[layer])
    return found


def stretches(segment: Segment, num_layers: int) -> Iterator[tuple[int, int, int, int]]:
    """Where it has rows: from a layer to another, those from one position to another."""
    layer = 0
    while layer < num_layers:
        start, stop = segment.starts[layer], segment.stops[layer]
        until = min(_end(segment.starts, layer, num_layers), _end(segment.stops, layer, num_layers))
        if start < stop:
            yield layer, until, start, stop
        layer = until


def _end(positions: tuple[int, ...], layer: int, num_layers: int) -> int:
    """The layer behind the last one with the same position as this: positions never grow."""
    position = positions[layer]
    if positions[num_layers - 1] == position:
        return num_layers
    return bisect_right(positions, -position, layer, num_layers, key=neg)
