"""Where the members of a table have their reads and writes: rows of all of them, one below the other.

Knows which row space of a pass a site has, no values and no ops.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum

from engine.fragments import RequestState
from engine.streams import Streams
from engine.views import RowView
from scheduling.plan import NO_ROWS, Plan

Place = tuple[int, tuple[int, ...] | None]  # an invoke and columns of its view, None for all
Places = tuple[Place, ...]  # by member
Group = tuple[tuple[int, ...], Places]  # which members, and what of them


class Side(Enum):
    """Which rows a read or a write of a table has."""

    AT = "at"  # those of a level
    INSIDE = "inside"  # those that a layer is run for
    BEHIND = "behind"  # a layer's outputs
    KEPT = "kept"  # those that the head runs on


@dataclass(frozen=True, slots=True)
class Where:
    """A row space of a pass."""

    side: Side
    level: int


@dataclass(frozen=True, slots=True)
class Spot:
    """Where the members of a table have a read or a write."""

    where: Where
    places: Places
    group: int  # equal numbers in one kind of pass: equal members and places


def form_of(plan: Plan) -> Hashable | None:
    """Equal for passes of the same members whose rows lie alike; None but for steps of generations alone.

    Such a pass has one row a sequence at every level, in the order of the views.
    """
    num_rows = sum(segment != NO_ROWS for view in plan.views for segment in view.segments)
    is_of_steps = all(view.begins for view in plan.views) and all(rows == num_rows for rows in plan.running_rows)
    return (
        tuple([(one.member, one.invoke, one.segments, one.kept_columns) for one in plan.views]) if is_of_steps else None
    )


class PassRows:
    """The rows of members in one pass, and in others of its form."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._rows: dict[tuple[object, int], RowView | None] = {}

    def at(self, spot: Spot, states: Sequence[RequestState]) -> RowView | None:
        """The rows of several members, one below the other; None where some lie outside of the stream.

        One object for as long as the stream is one: most levels of a pass have the same rows.
        """
        key = self._space(spot.where), spot.group
        if key not in self._rows:
            views = [self._view(spot.where, state, place) for state, place in zip(states, spot.places, strict=True)]
            is_plain = len({view.shape for view in views}) == 1 and not any(view.has_outputs for view in views)
            self._rows[key] = RowView.joined(views) if is_plain else None
        return self._rows[key]

    def _space(self, where: Where) -> object:
        if where.side is Side.KEPT:
            return None
        if where.side is Side.BEHIND and self._streams.giving:
            return where
        at = self._streams.inside if where.side is Side.INSIDE else self._streams.at
        return id(at(where.level))

    def _view(self, where: Where, state: RequestState, place: Place) -> RowView:
        invoke, columns = place
        rows = state.rows[invoke]
        match where.side:
            case Side.KEPT:
                return rows.kept(columns)
            case Side.INSIDE:
                return rows.inside(where.level, columns)
            case Side.BEHIND:
                return rows.behind(where.level, columns)
        return rows.at(where.level, columns)
