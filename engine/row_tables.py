"""Equal small programs of many members at one visit run as one: a table with a row for each member.

Owns which members of a pass share a table, and what is kept of it from pass to pass: steps of a generation run the same
programs again and again, so who stands together and the stacks of what never changes are worked out once. Knows no op
(`engine.row_ops`) and no form (`engine.outlines`).

Invariants
- A table changes no bit: each member's values are those that it has alone, so who shares a table need not be planned.
- A member's failure is its own: what a table cannot run, its members run one by one (`RequestState.run`), and nothing
  has been written or saved by then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from engine.fragments import RequestState, ShardContext
from engine.outlines import Bound, Outline, Outlines, Place
from engine.row_ops import Own, Stacks
from engine.steady import SteadyValues
from engine.streams import Streams
from engine.views import RowView
from engine.writes import PortValue, RowWrite
from scheduling.levels import Levels
from scheduling.plan import Fragment, RequestId

_MAX_BYTES = 1 << 26  # of all members' values
_MAX_PASSES = 8  # kinds of passes of which tables are kept

Member = tuple[RequestState, Fragment]
Places = tuple[tuple[int, Place], ...]  # by member: which state, and what of it
Part = tuple[int | None, int]  # which of a request's programs, and its wave
Key = tuple[tuple[int, int | None, int], ...]  # of a pass: which states, and their parts


@dataclass(frozen=True, slots=True)
class Seat:
    """A member at a table."""

    state: RequestState
    fragment: Fragment
    bound: Bound


class RowTables:
    """One a shard."""

    def __init__(self, context: ShardContext) -> None:
        is_split = context.links.ranks > 1
        self.steady = SteadyValues(is_split=is_split)
        self.num_rows = 0  # of tables that ran: a member at a visit is one
        self._levels = context.levels
        self._outlines = Outlines(context.sites.__getitem__, is_cpu=context.device.type == "cpu", is_split=is_split)
        self._bound: dict[RequestId, dict[tuple[Part, int], Bound | None]] = {}  # by part and order
        self._passes: OrderedDict[Key, _Kept] = OrderedDict()

    def of_pass(self, states: Sequence[RequestState], streams: Streams) -> PassTables:
        """The tables of a pass."""
        key = tuple([(id(state), *_part_of(state)) for state in states])
        kept = self._passes.get(key)
        if kept is None:
            kept = self._passes[key] = _Kept(frozenset(state.program.request for state in states), {})
            if len(self._passes) > _MAX_PASSES:
                self._passes.popitem(last=False)
        self._passes.move_to_end(key)
        return PassTables(self, kept.visits, streams)

    def forget(self, request: RequestId) -> None:
        """A request has ended."""
        self.steady.forget(request)
        self._bound.pop(request, None)
        for key in [key for key, kept in self._passes.items() if request in kept.requests]:
            del self._passes[key]

    def clear(self) -> None:
        """Gives the memory back."""
        self.steady.clear()
        self._bound.clear()
        self._passes.clear()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept of any request."""
        return not (self._bound or self._passes) and self.steady.is_empty

    def seated(self, members: Sequence[Member], order: int) -> Seated:
        """Who shares a table at a visit, and who stands alone."""
        groups: dict[int, list[Seat]] = {}
        alone: list[Member] = []
        for state, fragment in members:
            bound = self._bind(state, fragment)
            if bound is None:
                alone.append((state, fragment))
            else:
                groups.setdefault(id(bound.outline), []).append(Seat(state, fragment, bound))
        tables = []
        for group in groups.values():
            most = max(1, _MAX_BYTES // group[0].bound.outline.own_bytes)
            for first in range(0, len(group), most):
                seats = group[first : first + most]
                if len(seats) > 1:
                    tables.append(Table(seats, order, self._levels))
                else:
                    alone.extend((seat.state, seat.fragment) for seat in seats)
        return Seated(tables, alone)

    def _bind(self, state: RequestState, fragment: Fragment) -> Bound | None:
        known = self._bound.setdefault(state.program.request, {})
        part = _part_of(state)
        key = part, fragment.order
        if key not in known:
            is_steady = self.steady.asked(state.program, part[0])
            known[key] = self._outlines.bind(state.program, fragment, is_steady)
        return known[key]


def _part_of(state: RequestState) -> Part:
    assert state.member is not None, "a table belongs to a pass"
    return state.member.part, state.member.wave


@dataclass(frozen=True, slots=True)
class Seated:
    """A visit's members."""

    tables: list[Table]
    alone: list[Member]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Of one kind of pass."""

    requests: frozenset[RequestId]
    visits: dict[int, Seated]  # by order


class PassTables:
    """The tables of one pass, with the rows that their members have in it."""

    def __init__(self, tables: RowTables, visits: dict[int, Seated], streams: Streams) -> None:
        self._tables = tables
        self._visits = visits
        self._streams = streams
        self._rows: dict[tuple[object, Places], RowView | None] = {}

    def run(self, order: int, members: Sequence[Member], port: PortValue) -> Sequence[Member]:
        """Runs the tables of a visit; returns the members that have to run one by one."""
        if len(members) < 2 or port.pairs is not None or port.heads is not None:
            return members
        seated = self._visits.get(order)
        if seated is None:
            seated = self._visits[order] = self._tables.seated(members, order)
        left = seated.alone
        for table in seated.tables:
            missing = table.run(port, self)
            self._tables.num_rows += len(table.seats) - len(missing)
            if missing:
                left = [*left, *[(seat.state, seat.fragment) for seat in missing]]
        return left

    def rows(self, where: Where, states: Sequence[RequestState], places: Places) -> RowView | None:
        """The rows of several members, one below the other; None where some lie outside of the stream.

        One object for as long as the stream is one: most levels of a pass have the same rows.
        """
        key = self._space(where), places
        if key not in self._rows:
            views = [self._view(where, state, place) for state, (_, place) in zip(states, places, strict=True)]
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


def _is_whole(state: RequestState) -> bool:
    """Whether all of its nodes run."""
    return state.failure is None and state.member is not None and not state.member.absent


class Table:
    """Members whose fragments at a visit have one outline."""

    def __init__(self, seats: list[Seat], order: int, levels: Levels) -> None:
        self.seats, self._order, self._levels = seats, order, levels
        self._states = [seat.state for seat in seats]
        self._outline: Outline = seats[0].bound.outline
        self._reads = [
            (read, self._where(read.is_kept, read.is_output and levels.is_output(order), levels.of(order)), places)
            for read, places in zip(self._outline.reads, self._places("reads"), strict=True)
        ]
        self._writes = [
            (write, self._where(write.is_kept, False, levels.acts_from(order)), places)
            for write, places in zip(self._outline.writes, self._places("writes"), strict=True)
        ]
        self._steady: dict[int, Tensor] = {}  # stacks of steady values, by slot
        self._is_proven = False  # once it has run, and all had the shapes and dtypes that were planned

    def run(self, port: PortValue, rows: PassTables) -> list[Seat]:
        """Runs the members that are whole; returns those that it could not run, to which nothing has happened."""
        if not all(map(_is_whole, self._states)):
            return self._run_others(port, rows)
        try:
            stacks, written = self._values(port, rows)
        except Exception:  # noqa: BLE001  one of them fails: it will say so when each runs by itself
            return self.seats
        for (write, _, _), (at, value) in zip(self._writes, written, strict=True):
            port.write(write.selector, RowWrite(rows=at, value=value, in_place=write.in_place, turn=write.turn))
        self._give_back(stacks)
        return []

    def _run_others(self, port: PortValue, rows: PassTables) -> list[Seat]:
        left = [seat for seat in self.seats if not _is_whole(seat.state)]
        others = [seat for seat in self.seats if _is_whole(seat.state)]
        if len(others) < 2:
            return self.seats
        return [*left, *Table(others, self._order, self._levels).run(port, rows)]

    def _values(self, port: PortValue, rows: PassTables) -> tuple[Stacks, list[tuple[RowView, Tensor]]]:
        """All stacks, and what is written where. Raises when a member's value is not what was planned."""
        outline, num = self._outline, len(self.seats)
        stacks: Stacks = [None] * len(outline.owns)
        for place, slot in enumerate(outline.outside):
            stacks[slot] = self._steady.get(slot)
            if stacks[slot] is None:
                stacks[slot] = self._stacked(place, outline.owns[slot])
                if outline.is_steady[place]:
                    self._steady[slot] = stacks[slot]
        for read, where, places in self._reads:
            at = self._rows_of(rows, where, places)
            value = at.read(port.tensors[read.selector])
            if at.is_run:
                value = value.clone(memory_format=torch.contiguous_format)
            stacks[read.slot] = value.view(num, *read.shape)
        for slot, step in outline.steps:
            stacks[slot] = step(stacks)
        if not self._is_proven:
            self._prove(stacks)
        written = []
        for write, where, places in self._writes:
            at = self._rows_of(rows, where, places)
            value = stacks[write.slot].to(port.tensors[write.selector].dtype)
            written.append((at, value.reshape(*at.shape, *value.shape[3:])))
        return stacks, written

    def _give_back(self, stacks: Stacks) -> None:
        """What each member has afterwards."""
        outline = self._outline
        stays = [stacks[slot].unbind(0) for slot in outline.stays]
        saves = [None if slot is None else stacks[slot].unbind(0) for slot in outline.saves]
        for place, seat in enumerate(self.seats):
            state, bound = seat.state, seat.bound
            state.fired.extend(bound.fired)
            for node, values in zip(bound.stays, stays, strict=True):
                is_held = state.member is not None and node in state.member.holds  # for longer than others beside it
                state.values[node] = values[place].clone() if is_held else values[place]
            for node, parts in zip(bound.saves, saves, strict=True):
                state.save(node, None if parts is None else parts[place])
            for node in bound.drops:
                state.values.pop(node, None)

    def _stacked(self, place: int, own: Own) -> Tensor:
        """A value from outside, of all members."""
        values = [seat.state.values[seat.bound.outside[place]] for seat in self.seats]
        first = values[0]
        for value in values:
            if value.shape != own.shape or value.dtype is not own.dtype or not value.is_contiguous():
                raise ValueError("a value is not what was planned")
        if all(value is first for value in values):
            spread: Tensor = first.expand(len(values), *own.shape)
            return spread
        return torch.stack(values)

    def _prove(self, stacks: Stacks) -> None:
        num = len(self.seats)
        for slot, own in enumerate(self._outline.owns):
            if stacks[slot].shape != (num, *own.shape) or stacks[slot].dtype is not own.dtype:
                raise ValueError("a value is not what was planned")
        self._is_proven = True

    def _rows_of(self, rows: PassTables, where: Where, places: Places) -> RowView:
        at = rows.rows(where, self._states, places)
        if at is None:
            raise ValueError("rows of trunks are read one by one")
        return at

    def _where(self, is_kept: bool, is_output: bool, level: int) -> Where:
        if is_kept:
            return Where(Side.KEPT, 0)
        if is_output:
            return Where(Side.BEHIND, level)
        return Where(Side.INSIDE if self._levels.is_inside(self._order) else Side.AT, level)

    def _places(self, what: str) -> list[Places]:
        """For each read or write of the outline, where the members have it."""
        own = [getattr(seat.bound, what) for seat in self.seats]
        return [
            tuple([(id(state), place) for state, place in zip(self._states, places, strict=True)])
            for places in zip(*own, strict=True)
        ]
