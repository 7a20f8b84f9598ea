"""Which rows of a pass decode: single ones whose keys and values are added to the cache that has all before them.

Such a row finds every key where it lies: in its sequence's cache, which has its own by then, and before that in caches
that others share. All else of a pass (prompts, forks, rows behind something that is no cache) goes the general way,
with rows of trunks gathered behind the stream's. Worked out from the plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scheduling.plan import PAGE, Grow, Plan, Segment, TrunkId


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions of a cache that come before those of another."""

    trunk: TrunkId
    begin: int  # the cache's first position
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRow:
    """One row that decodes."""

    segment: int
    position: int
    grow: Grow  # its own cache's
    before: tuple[Piece, ...]  # all positions before its own cache's, in order


def decoded_rows(plan: Plan) -> dict[int, DecodedRow]:
    """By segment."""
    found: dict[int, DecodedRow] = {}
    for grow in plan.grows:
        if grow.segment not in found:
            row = _decoded(plan.segments, grow)
            if row is not None:
                found[grow.segment] = row
    kept = {keep.segment for keep in plan.keeps}
    return {place: row for place, row in found.items() if place not in kept}


def _decoded(segments: tuple[Segment, ...], grow: Grow) -> DecodedRow | None:
    own, position = segments[grow.segment], grow.start
    is_single = own.starts[0] == own.starts[-1] == position and own.stops[0] == own.stops[-1] == position + 1
    if not is_single or grow.stop != position + 1 or own.trunk is not None:
        return None
    stop, pieces = position, list[Piece]()
    parent = own.parent
    while stop:
        trunk = None if parent is None else segments[parent]
        if trunk is None or trunk.trunk is None or trunk.trunk[1] >= 0:
            return None  # something that is no cache
        begin = trunk.starts[0]
        if begin < stop:
            pieces.insert(0, Piece(trunk.trunk, begin, begin, stop))
            stop = begin
        parent = trunk.parent
    if grow.begin < position:
        last = pieces.pop()
        if last.trunk != grow.trunk or last.begin != grow.begin:
            return None  # its cache has no rows before it, or others
    if any(piece.stop % PAGE for piece in pieces):
        return None
    return DecodedRow(segment=grow.segment, position=position, grow=grow, before=tuple(pieces))


def joined_trunks(plan: Plan, decoded: Mapping[int, DecodedRow]) -> set[int]:
    """Places of the trunks whose rows somebody looks for who does not decode."""
    found: set[int] = set()
    growing = {grow.segment for grow in plan.grows if _is_behind(plan.segments[grow.segment], grow)}
    for place, segment in enumerate(plan.segments):
        if segment.trunk is not None or (place in decoded and place not in growing):
            continue
        parent = segment.parent
        while parent is not None:
            if plan.segments[parent].trunk is not None:
                found.add(parent)
            parent = plan.segments[parent].parent
    return found


def _is_behind(segment: Segment, grow: Grow) -> bool:
    """Whether rows that go into a cache are a parent's."""
    return grow.start < segment.starts[0]
