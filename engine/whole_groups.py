"""Runs calls of several requests, and of one, as one call of the module: each at its own rows.

Which these are, and so which bits they have, follows from each call alone, never from who else is there: no gradients,
sites of which it has rows of its own, and arguments that the gate lets (`engine.whole_merging`). Such a call goes in
the same manner when nobody is beside it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Selector
from engine.memory import told_out_of_memory
from engine.module_state import kept_memory, settings_of
from engine.whole_call import Enough, Key, WholeCall, current, hooked
from engine.whole_contents import Called, likeness
from engine.whole_manner import CallByCall
from engine.whole_merging import Rows, Verdict, judge, rows_of, together, try_up_to
from engine.whole_side import Side
from engine.whole_sites import CallSites, told
from engine.whole_state import CallState
from engine.writes import with_member
from polytrace.graph import Node, Read, Write
from scheduling.alike import MOST_CALLS
from scheduling.call_turns import Turn, joined, turns_of
from scheduling.plan import PROLOGUE, Fragment, Member, RequestId

_MOST_VERDICTS = 256


class CallGroups:
    """Of one model. `verdicts` are by structure and likeness, of the settings that the model has."""

    def __init__(self, model: nn.Module, device: torch.device, sites: CallSites, *, is_fixed: bool) -> None:
        """`sites`: finds what calls of the model visit. `is_fixed`: nobody sets anything on the model between calls."""
        self._model, self._device, self._sites, self._is_fixed = model, device, sites, is_fixed
        self.verdicts: OrderedDict[Hashable, Verdict] = OrderedDict()
        self._settings: Hashable = None
        self.merged: list[tuple[RequestId, ...]] = []  # calls that went as one since somebody took this, by requests

    def run(self, waves: Sequence[tuple[Member, CallState]], alone: Callable[[Turn, CallState], None]) -> None:
        """Runs waves that no gradient is asked of; `alone` runs calls as they are."""
        settings = None if self._is_fixed else settings_of(self._model), torch.get_num_threads()
        if settings != self._settings:  # what was found of others says nothing of these
            self._settings = settings
            self.verdicts.clear()
        waiting = [deque(self._parts(*each)) for each in waves]
        while going := [parts.popleft() for parts in waiting if parts]:
            groups: dict[Hashable, list[_Part]] = {}
            for part in going:
                if part.state.has_failed:
                    continue
                if part.key is None:
                    alone(part.turn, part.state)
                else:
                    groups.setdefault(part.key, []).append(part)
            for parts in groups.values():
                if self._may_go(parts):
                    self._run_group(parts)
                    continue
                for part in parts:
                    for turn in part.turns:
                        alone(turn, part.state)

    def take_merged(self) -> tuple[tuple[RequestId, ...], ...]:
        """The calls that went as one since it was asked before, by their requests."""
        merged, self.merged = tuple(self.merged), []
        return merged

    def _parts(self, member: Member, state: CallState) -> Iterator[_Part]:
        """The calls of a wave, those that may go as one together."""
        pending: list[_Part] = []
        for turn in turns_of(member.program, member.wave):
            part = _Part(state, (turn,), *self._judged(turn, state), turn)
            if pending and (part.key is None or part.key != pending[0].key or len(pending) == MOST_CALLS):
                yield _together(pending)
                pending = []
            if part.key is None:
                yield part
            else:
                pending.append(part)
        if pending:
            yield _together(pending)

    def _judged(self, turn: Turn, state: CallState) -> tuple[Hashable, Verdict | None]:
        """What calls that go together have in common, and what is known of them; None of one that goes as it is."""
        if len(turn.invokes) != 1 or state.has_failed:
            return None, None  # where there are several they wait for each other
        try:
            called = state.arguments(turn.invokes[0])
            key = repr(state.structure(turn.invokes[0])), likeness(called)
        except Exception:  # noqa: BLE001  whatever is wrong with what it is given, it says so when it runs
            return None, None
        verdict = self.verdicts.get(key) or self._tried(state, turn.invokes[0], called)
        if verdict is None:
            return None, None
        self.verdicts[key] = verdict
        self.verdicts.move_to_end(key)
        if len(self.verdicts) > _MOST_VERDICTS:
            self.verdicts.popitem(last=False)
        if verdict.refusal is not None or not _has_rows(turn, state, verdict.rows):
            return None, None
        return (key, _assigned(turn, state)), verdict

    def _tried(self, state: CallState, invoke: int, called: Called) -> Verdict | None:
        inputs = state.program.invokes[invoke].inputs
        assert inputs is not None, "the request was checked"
        # What is seen of one call says nothing of another where values decide.
        if not self._sites.follow_from_structure(inputs, state.outlines(invoke)):
            return Verdict(refusal="what a call visits depends on values")
        return judge(self._model, called, self._device)

    def _may_go(self, parts: Sequence[_Part]) -> bool:
        """Whether calls of one key may go as one, also as so many."""
        first, calls = parts[0], sum(part.num_calls for part in parts)
        assert first.verdict is not None, "they have a key"
        if calls > 1:
            called = first.state.arguments(first.turn.invokes[0])
            try_up_to(first.verdict, min(calls, MOST_CALLS), self._model, called, self._device)
        return first.verdict.refusal is None

    def _run_group(self, parts: Sequence[_Part]) -> None:
        """Runs all of them, as many as may go at a time."""
        verdict = parts[0].verdict
        assert verdict is not None, "they have a key"
        most = verdict.most(MOST_CALLS)
        going: list[_Part] = []
        for part in [smaller for each in parts for smaller in each.split(most)]:
            if going and sum(one.num_calls for one in going) + part.num_calls > most:
                self._run_one(going, verdict)
                going = []
            going.append(part)
        self._run_one(going, verdict)

    def _run_one(self, parts: Sequence[_Part], verdict: Verdict) -> None:
        """Runs them as one; one by one where that raises, so that who it is about is found."""
        before = [part.state.moment() for part in parts]
        try:
            self._go(parts, verdict)
        except Exception as error:  # noqa: BLE001  whatever code of the model raises is about one of them
            for part, mark in zip(parts, before, strict=True):
                part.state.back_to(mark)
            smaller = [one for part in parts for one in part.split(1)]
            if len(smaller) > 1:
                for one in smaller:
                    if not one.state.has_failed:
                        self._run_one([one], verdict)
                return
            memory = told_out_of_memory(error)
            reason = memory or f"{type(self._model).__name__} raised {told(error)}"
            parts[0].state.fail(parts[0].turn.fragments[0].nodes[0], reason, is_out_of_memory=memory is not None)
            return
        owners = [part.state.program.request for part in parts for _ in part.turn.invokes]
        if len(owners) > 1:
            self.merged.append(tuple(owners))

    def _go(self, parts: Sequence[_Part], verdict: Verdict) -> None:
        is_in_place = any(isinstance(node, Write) and node.in_place for part in parts for node in part.nodes)
        kept = kept_memory(self._model) if is_in_place else frozenset()
        going = [_Going.of(part) for part in parts]
        starts = list(accumulate((part.num_calls for part in parts), initial=0))
        keys = list(dict.fromkeys(key for one in going for key in one.visits))
        for one in going:
            one.run_up_to(PROLOGUE, {})

        def come(place: int, value: Any) -> Any:
            shared = Shared(value)
            with current(None), torch.no_grad(), torch._C.DisableTorchFunction():
                for start, one in zip(starts, going, strict=False):
                    order, invokes = one.visits.get(keys[place], (PROLOGUE, {}))
                    if invokes:
                        sides = {
                            invoke: RowsSide(shared, kept, keys[place], verdict.rows, start + number)
                            for invoke, number in invokes.items()
                        }
                        one.run_up_to(order, sides)
            return shared.value

        if keys:
            call = WholeCall({key: place for place, key in enumerate(keys)}, come=come)
            calls = [part.state.arguments(invoke) for part in parts for invoke in part.turn.invokes]
            args, kwargs = together(calls, verdict.size_of(len(calls)))
            with call.recording(), hooked(self._model, call), current(call), suppress(Enough), CallByCall():
                self._model(*args, **kwargs)
        for one in going:
            one.run_up_to(None, {})


class Shared:
    """A module's side at a visit, for all whose calls are one there. They assign to the same tensors in it."""

    def __init__(self, value: Any) -> None:
        self.had = value  # what the module has
        self.value = value  # what goes on
        self.put: dict[Selector, Tensor] = {}  # what was put in the place of the module's tensors, for all calls


class RowsSide(Side):
    """What one of several calls in one has of a module's side."""

    def __init__(self, shared: Shared, kept: Collection[int], key: Key, rows: Rows, number: int) -> None:
        super().__init__(shared.had, _nobody, kept)
        self._shared, self._key, self._rows, self._number = shared, key, rows, number

    def read(self, selector: Selector) -> Tensor:
        """A snapshot, in one layout however many calls there are: torch adds up in another order over other strides."""
        return self._tensor(selector).clone(memory_format=torch.contiguous_format)

    def _put(self, selector: Selector, given: Tensor) -> None:
        """Puts one tensor there for all; until a call has its own value in it, what it has is the module's."""
        shared = self._shared
        if selector not in shared.put:
            shared.put[selector] = self._whole(selector).clone()
            shared.value = with_member(shared.value, selector, shared.put[selector])
        self.value = with_member(self.value, selector, shared.put[selector])
        self._tensor(selector).copy_(given)

    def _tensor(self, selector: Selector) -> Tensor:
        return rows_of(self._whole(selector), self._number, self._rows[self._key, selector])


def _nobody(_tensor: Tensor) -> None:
    """There is no gradient that a write would have to be told to."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Calls of one request that may go as one, one turn after another."""

    state: CallState
    turns: tuple[Turn, ...]
    key: Hashable  # None: as they are
    verdict: Verdict | None  # of calls with a key
    turn: Turn  # all of them

    @property
    def num_calls(self) -> int:
        return len(self.turn.invokes)

    @property
    def nodes(self) -> Iterator[Node]:
        nodes = self.state.program.graph.nodes
        return (nodes[node] for fragment in self.turn.fragments for node in fragment.nodes)

    def split(self, most: int) -> list[_Part]:
        """In parts of at most so many calls."""
        if self.num_calls <= most:
            return [self]
        starts = range(0, len(self.turns), most)
        some = [self.turns[start : start + most] for start in starts]
        return [replace(self, turns=turns, turn=joined(turns, self.state.program)) for turns in some]


def _together(parts: Sequence[_Part]) -> _Part:
    """Calls of one key, one after another."""
    turns = tuple([turn for part in parts for turn in part.turns])
    return replace(parts[0], turns=turns, turn=joined(turns, parts[0].state.program))


def _has_rows(turn: Turn, state: CallState, rows: Rows) -> bool:
    """Whether all that is read and written is of the call's own rows, or is read and the same for all."""
    for fragment in turn.fragments:
        for node in map(state.program.graph.nodes.__getitem__, fragment.nodes):
            if isinstance(node, (Read, Write)):
                spot = (node.site.module, node.site.port, node.site.visit), node.site.selector
                if spot not in rows or (isinstance(node, Write) and rows[spot] is None):
                    return False
    return True


def _assigned(turn: Turn, state: CallState) -> Hashable:
    """Where a call puts other tensors in the place of the module's: whoever else holds these keeps them unchanged, and
    that may not be for a neighbour's sake.
    """
    nodes = [state.program.graph.nodes[node] for fragment in turn.fragments for node in fragment.nodes]
    return frozenset([node.site for node in nodes if isinstance(node, Write) and not node.in_place])


@dataclass(frozen=True, slots=True)
class _Going:
    """A part on its way through a call."""

    state: CallState
    fragments: dict[int, Fragment]  # that are still to run, by order
    visits: dict[Key, tuple[int, dict[int, int]]]  # -> order, and the invokes that are visited with their places

    @classmethod
    def of(cls, part: _Part) -> _Going:
        visits: dict[Key, tuple[int, dict[int, int]]] = {}
        nodes = part.state.program.graph.nodes
        for fragment in part.turn.fragments:
            for node in map(nodes.__getitem__, fragment.nodes):
                if isinstance(node, (Read, Write)):
                    key = node.site.module, node.site.port, node.site.visit
                    order, invokes = visits.setdefault(key, (fragment.order, {}))
                    assert order == fragment.order, "calls of one structure have their sites in one order"
                    invokes[node.invoke] = part.turn.invokes.index(node.invoke)
        return cls(part.state, {one.order: one for one in part.turn.fragments}, visits)

    def run_up_to(self, order: int | None, sides: Mapping[int, Side]) -> None:
        """Everything that is due up to a visit (None: to the end), where calls have these sides of the module."""
        for due in sorted(one for one in self.fragments if order is None or one <= order):
            self.state.run_at(self.fragments.pop(due), sides if due == order else {})
