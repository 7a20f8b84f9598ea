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
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.fragments import RequestState, ShardContext
from engine.outlines import Bound, Outline, Outlines
from engine.row_ops import Own, Stacks
from engine.row_spots import Group, PassRows, Places, Side, Spot, Where, form_of
from engine.steady import SteadyValues
from engine.streams import Streams
from engine.views import RowView
from engine.writes import PortValue, RowWrite
from scheduling.levels import Levels
from scheduling.plan import Fragment, RequestId

_MAX_BYTES = 1 << 26  # of all members' values
_MAX_PASSES = 8  # kinds of passes of which tables are kept
_MAX_KEPT_BYTES = 1 << 27  # of their stacks, when another kind comes

Member = tuple[RequestState, Fragment]
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
        self._passes: OrderedDict[Key, _PassKind] = OrderedDict()

    def of_pass(self, states: Sequence[RequestState], streams: Streams) -> PassTables:
        """The tables of a pass."""
        key = tuple([(id(state), *_part_of(state)) for state in states])
        kept = self._passes.get(key)
        if kept is None:
            num_bytes = sum(one.num_bytes for one in self._passes.values())
            while len(self._passes) >= _MAX_PASSES or num_bytes > _MAX_KEPT_BYTES:
                num_bytes -= self._passes.popitem(last=False)[1].num_bytes
            kept = self._passes[key] = _PassKind(frozenset(state.program.request for state in states))
        self._passes.move_to_end(key)
        form = form_of(streams.plan)
        if kept.rows is None or form is None or form != kept.form:
            kept.form, kept.rows = form, PassRows(streams)
        return PassTables(self, kept, kept.rows)

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

    def seated(self, members: Sequence[Member], order: int, groups_known: dict[Group, int]) -> Seated:
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
                    tables.append(Table(seats, order, self._levels, groups_known))
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


@dataclass(slots=True)
class _PassKind:
    """Of one kind of pass."""

    requests: frozenset[RequestId]
    visits: dict[int, Seated] = field(default_factory=dict)  # by order
    groups: dict[Group, int] = field(default_factory=dict)  # numbers of groups: most visits have the same
    form: Hashable | None = None  # of the last pass
    rows: PassRows | None = None  # the same for as long as passes have one form

    @property
    def num_bytes(self) -> int:
        """Of stacks."""
        return sum(table.steady_bytes for seated in self.visits.values() for table in seated.tables)


class PassTables:
    """The tables of one pass."""

    def __init__(self, tables: RowTables, kept: _PassKind, rows: PassRows) -> None:
        self._tables = tables
        self._kept = kept
        self._rows = rows

    def run(self, order: int, members: Sequence[Member], port: PortValue) -> Sequence[Member]:
        """Runs the tables of a visit; returns the members that have to run one by one."""
        if len(members) < 2 or port.pairs is not None or port.heads is not None:
            return members
        seated = self._kept.visits.get(order)
        if seated is None:
            seated = self._kept.visits[order] = self._tables.seated(members, order, self._kept.groups)
        left = seated.alone
        for table in seated.tables:
            missing = table.run(port, self._rows)
            self._tables.num_rows += len(table.seats) - len(missing)
            if missing:
                left = [*left, *[(seat.state, seat.fragment) for seat in missing]]
        return left


def _is_whole(state: RequestState) -> bool:
    """Whether all of its nodes run."""
    return state.failure is None and state.member is not None and not state.member.absent


class Table:
    """Members whose fragments at a visit have one outline."""

    def __init__(self, seats: list[Seat], order: int, levels: Levels, groups: dict[Group, int]) -> None:
        """`groups`: numbers of those that are known; they are added to."""
        self.seats, self._order, self._levels, self._groups = seats, order, levels, groups
        self._states = [seat.state for seat in seats]
        self._outline: Outline = seats[0].bound.outline
        reads = zip(*[seat.bound.reads for seat in seats], strict=True)
        writes = zip(*[seat.bound.writes for seat in seats], strict=True)
        self._reads = [
            (read, self._spot(read.is_kept, read.is_output and levels.is_output(order), levels.of(order), places))
            for read, places in zip(self._outline.reads, reads, strict=True)
        ]
        self._writes = [
            (write, self._spot(write.is_kept, False, levels.acts_from(order), places))
            for write, places in zip(self._outline.writes, writes, strict=True)
        ]
        self._steady: dict[int, Tensor] = {}  # stacks of steady values, by slot
        self._is_proven = False  # once it has run, and all had the shapes and dtypes that were planned
        self._is_unfit = False  # once it could not run

    def run(self, port: PortValue, rows: PassRows) -> list[Seat]:
        """Runs the members that are whole; returns those that it could not run, to which nothing has happened."""
        if self._is_unfit:
            return self.seats
        if not all(map(_is_whole, self._states)):
            return self._run_others(port, rows)
        try:
            stacks, written = self._values(port, rows)
        except Exception:  # noqa: BLE001  one of them fails: it will say so when each runs by itself
            self._is_unfit = True
            self._steady.clear()
            return self.seats
        for (write, _), (at, value) in zip(self._writes, written, strict=True):
            port.write(write.selector, RowWrite(rows=at, value=value, in_place=write.in_place, turn=write.turn))
        self._give_back(stacks)
        return []

    @property
    def steady_bytes(self) -> int:
        """Of stacks that stay from pass to pass."""
        return sum(stack.nbytes for stack in self._steady.values())

    def _run_others(self, port: PortValue, rows: PassRows) -> list[Seat]:
        left = [seat for seat in self.seats if not _is_whole(seat.state)]
        others = [seat for seat in self.seats if _is_whole(seat.state)]
        if len(others) < 2:
            return self.seats
        return [*left, *Table(others, self._order, self._levels, self._groups).run(port, rows)]

    def _values(self, port: PortValue, rows: PassRows) -> tuple[Stacks, list[tuple[RowView, Tensor]]]:
        """All stacks, and what is written where. Raises when a member's value is not what was planned."""
        outline, num = self._outline, len(self.seats)
        stacks: Stacks = [None] * len(outline.owns)
        for place, slot in enumerate(outline.outside):
            stacks[slot] = self._steady.get(slot)
            if stacks[slot] is None:
                stacks[slot] = self._stacked(place, outline.owns[slot])
                if outline.is_steady[place]:
                    self._steady[slot] = stacks[slot]
        for read, spot in self._reads:
            at = self._rows_of(rows, spot)
            value = at.read(port.tensors[read.selector])
            if at.is_run:
                value = value.clone(memory_format=torch.contiguous_format)
            stacks[read.slot] = value.view(num, *read.shape)
        for slot, step in outline.steps:
            stacks[slot] = step(stacks)
        if not self._is_proven:
            self._prove(stacks)
        written = []
        for write, spot in self._writes:
            at = self._rows_of(rows, spot)
            value = stacks[write.slot].to(port.tensors[write.selector].dtype)
            written.append((at, value.reshape(*at.shape, *value.shape[3:])))
        return stacks, written

    def _give_back(self, stacks: Stacks) -> None:
        """What each member has afterwards."""
        outline = self._outline
        if outline.stays or outline.saves:
            self._hand_out(stacks)
        for seat in self.seats:
            state, bound = seat.state, seat.bound
            state.fired += bound.fired
            for node in bound.drops:
                state.values.pop(node, None)

    def _hand_out(self, stacks: Stacks) -> None:
        """Values that are saved, or needed later."""
        outline = self._outline
        stays = [stacks[slot].unbind(0) for slot in outline.stays]
        saves = [None if slot is None else stacks[slot].unbind(0) for slot in outline.saves]
        for place, seat in enumerate(self.seats):
            state, bound = seat.state, seat.bound
            for node, values in zip(bound.stays, stays, strict=True):
                is_held = state.member is not None and node in state.member.holds  # for longer than others beside it
                state.values[node] = values[place].clone() if is_held else values[place]
            for node, parts in zip(bound.saves, saves, strict=True):
                state.save(node, None if parts is None else parts[place])

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

    def _rows_of(self, rows: PassRows, spot: Spot) -> RowView:
        at = rows.at(spot, self._states)
        if at is None:
            raise ValueError("rows of trunks are read one by one")
        return at

    def _spot(self, is_kept: bool, is_output: bool, level: int, places: Places) -> Spot:
        group = (tuple(map(id, self._states)), places)
        number = self._groups.setdefault(group, len(self._groups))
        if is_kept:
            return Spot(Where(Side.KEPT, 0), places, number)
        inside = Side.INSIDE if self._levels.is_inside(self._order) else Side.AT
        return Spot(Where(Side.BEHIND if is_output else inside, level), places, number)
