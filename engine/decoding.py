"""Attention of rows that decode: many single rows, each against the cache that has all before it, at one time.

Keys and values are read where they lie (`engine.caches`): neighbouring slots of a slab are one batch of products. What
several sequences have in common lies once, and all their queries meet it in one product. Every number is computed as
`engine.pages` does: scores over the head dimension, a softmax over whole pages, values page by page in order. So a row
has the bits that it would have in a prompt. Pages that no row of a run sees, behind a window, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import Cache, Caches, Slab
from engine.copies import row_index, to_device
from engine.decoded import DecodedRow, Piece
from engine.few_rows import fewest_rows
from engine.pages import PagedLayer, add_pages, capped, product
from engine.streams import Stream
from scheduling.plan import PAGE

# B = slots of a run, W = columns of their own caches, P = of a piece before these; G, E, C, U, T as in `engine.pages`

_MOST_HOLES = 2  # slots between two of a run that are computed for nothing, rather than begin another


@dataclass(frozen=True, slots=True)
class _Sight:
    """What a run's rows see of some columns."""

    start: int  # the first column that any of them sees, a multiple of PAGE
    hidden: Tensor | None  # [B, 1, 1, columns from `start` on], None: they see all


class Run:
    """Neighbouring slots of a slab whose rows have the same pieces before them."""

    def __init__(
        self,
        slab: Slab,
        rows: Sequence[tuple[int, int, DecodedRow]],
        pieces: Sequence[tuple[Cache, Piece]],
        device: torch.device,
    ) -> None:
        """`rows`: slot, row of the stream, and what it is; by slot."""
        self.slab = slab
        self.pieces = pieces
        self.device = device
        self.first = rows[0][0]
        self.num_slots = rows[-1][0] + 1 - self.first
        by_slot = {slot - self.first: (row, one) for slot, row, one in rows}
        some = by_slot[0]  # a hole is computed as if it had the same row
        filled = [by_slot.get(place, some) for place in range(self.num_slots)]
        self.begin = some[1].grow.begin  # all rows have the same pieces before, and so begin alike
        self.positions = [one.position for _, one in filled]
        self.num_columns = -(-(max(self.positions) + 1 - self.begin) // PAGE) * PAGE
        self.rows = row_index([row for row, _ in filled], device)
        self.real = None if len(rows) == self.num_slots else to_device(sorted(by_slot), device)
        self.out_rows = row_index([row for _, row, _ in rows], device)
        self.segments = {slot: one.segment for slot, _, one in rows}
        self._sights: dict[int | None, list[_Sight]] = {}

    def odd(self, layer: int) -> Iterable[int]:
        """Segments whose rows see values that are not finite: then products of whole pages do not do."""
        if any(cache.slot in cache.slab.layers[layer].odd for cache, _ in self.pieces):
            return self.segments.values()
        return [self.segments[slot] for slot in self.slab.layers[layer].odd if slot in self.segments]

    def sights(self, window: int | None) -> list[_Sight]:
        """Of each piece before, and of the rows' own caches."""
        if window not in self._sights:
            ranges = [(piece.start, piece.stop) for _, piece in self.pieces]
            self._sights[window] = [
                self._sight(start, stop, window)
                for start, stop in (*ranges, (self.begin, self.begin + self.num_columns))
            ]
        return self._sights[window]

    def _sight(self, start: int, stop: int, window: int | None) -> _Sight:
        earliest = 0 if window is None else max(0, min(self.positions) + 1 - window)
        first = min(stop, max(start, earliest // PAGE * PAGE))
        positions, columns = torch.tensor(self.positions)[:, None], torch.arange(first, stop)
        hidden = columns > positions
        if window is not None:
            hidden |= positions - columns >= window
        return _Sight(first - start, to_device(hidden[:, None, None], self.device) if bool(hidden.any()) else None)


class Decoding:
    """The rows of a level that decode."""

    def __init__(self, stream: Stream, rows: Iterable[DecodedRow], caches: Caches, device: torch.device) -> None:
        groups: dict[tuple[object, ...], list[tuple[int, int, DecodedRow]]] = {}
        slabs: dict[int, Slab] = {}
        for one in rows:
            if stream.level in stream.segments[one.segment].skips:
                continue
            cache = caches.of(one.grow.trunk)
            slabs[id(cache.slab)] = cache.slab
            groups.setdefault((id(cache.slab), one.before), []).append((cache.slot, stream.bases[one.segment], one))
        self.segments = frozenset(one.segment for group in groups.values() for _, _, one in group)
        self._rows = {row: one.segment for group in groups.values() for _, row, one in group}
        self.runs: list[Run] = []
        for (slab, _), group in groups.items():
            pieces = [(caches.of(piece.trunk), piece) for piece in group[0][2].before]
            for near in _neighbours(sorted(group, key=lambda found: found[0])):
                self.runs.append(Run(slabs[slab], near, pieces, device))  # type: ignore[index]

    def apart(self, layer: int, asked: Iterable[int]) -> frozenset[int]:
        """Segments that do not decode at a layer after all: with rows that are asked for, or that see odd values."""
        found = {self._rows[row] for row in asked if row in self._rows}
        for run in self.runs:
            found.update(run.odd(layer))
        return frozenset(found)

    def attend(self, number: int, layer: PagedLayer) -> None:
        """Computes the rows of a layer."""
        for run in self.runs:
            _attend(run, number, layer)


def _neighbours(rows: list[tuple[int, int, DecodedRow]]) -> Iterable[list[tuple[int, int, DecodedRow]]]:
    near = rows[:1]
    for one in rows[1:]:
        if one[0] - near[-1][0] > _MOST_HOLES + 1:
            yield near
            near = []
        near.append(one)
    yield near


def _attend(run: Run, number: int, layer: PagedLayer) -> None:
    slots, groups, share = run.num_slots, layer.num_groups, layer.share
    sights = run.sights(layer.formula.window)
    held = run.slab.layers[number]
    span = slice(run.first, run.first + slots)
    columns = slice(sights[-1].start, run.num_columns)
    keys, values = (tensor[span, :, columns].flatten(0, 1) for tensor in (held.keys_SGPC, held.values_SGPU))
    before = [
        tuple(tensor[:, sight.start : piece.stop - piece.start] for tensor in _slot(cache, number))
        for (cache, piece), sight in zip(run.pieces, sights, strict=False)
    ]
    key_dim, value_dim = keys.shape[2], values.shape[2]
    least = fewest_rows(slots * groups, key_dim, value_dim)
    # 1) scores, over the pieces that several share and over each row's own cache
    vectors = share if before else max(share, least)  # of a slot and group: those behind `share` are padding
    q_BGEC = keys.new_zeros(slots, groups, vectors, key_dim)
    query_BGEC = (
        layer.query_TGEC[run.rows] if isinstance(run.rows, slice) else layer.query_TGEC.index_select(0, run.rows)
    )
    torch.mul(query_BGEC, layer.formula.scaling, out=q_BGEC[:, :, :share])
    parts = [
        product(q_BGEC.transpose(0, 1).flatten(1, 2), key.transpose(1, 2), fewest_rows(groups, key_dim, value_dim))
        .unflatten(1, (slots, share))
        .transpose(0, 1)
        for key, _ in before
    ]
    parts.append(product(q_BGEC.flatten(0, 1), keys.transpose(1, 2), least).view(slots, groups, vectors, -1))
    if layer.formula.softcap is not None:
        parts = [capped(part.contiguous(), layer.formula.softcap) for part in parts]
    for part, sight in zip(parts, sights, strict=True):
        if sight.hidden is not None:
            part.masked_fill_(sight.hidden, -math.inf)
    # 2) the softmax over whole pages
    if layer.sinks_GE is not None:
        sinks = q_BGEC.new_full((slots, groups, vectors, PAGE), -math.inf)
        sinks[:, :, :share, 0] = layer.sinks_GE
        parts.insert(0, sinks)
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
    pattern_BGEW = torch.softmax(scores, 3)
    # 3) values, page by page
    done = 0 if layer.sinks_GE is None else PAGE
    sum_BGEU = q_BGEC.new_zeros(slots, groups, vectors, value_dim)
    if before:
        sum_GNU = sum_BGEU.view(groups, slots * share, -1)
        for _, value in before:
            pattern = pattern_BGEW[..., done : done + value.shape[1]].transpose(0, 1).flatten(1, 2)
            sum_GNU = add_pages(sum_GNU, pattern, value, fewest_rows(groups, key_dim, value_dim))
            done += value.shape[1]
        sum_BGEU = sum_GNU.unflatten(1, (slots, share)).transpose(0, 1)
    own = pattern_BGEW[..., done:].flatten(0, 1)
    out = add_pages(sum_BGEU.flatten(0, 1), own, values, least).unflatten(0, (slots, groups))[:, :, :share]
    if run.real is not None:
        out = out.index_select(0, run.real)
    if isinstance(run.out_rows, slice):
        layer.out_TGEC[run.out_rows] = out
    else:
        layer.out_TGEC.index_copy_(0, run.out_rows, out)


def _slot(cache: Cache, number: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[G, P, C]` of all of a slot."""
    held = cache.slab.layers[number]
    return held.keys_SGPC[cache.slot], held.values_SGPU[cache.slot]
