"""Runs calls of several requests, and of one, as one call of the module: each at its own rows.

Which bits a call has never follows from who else is there: one without gradients always goes in the manner of calls
that may be one, where calls of its structure do at all (`engine.whole_merging`). Whether they do is told by the first
of them, by its own content, and kept (of the last `_MOST_TOLD` structures): where contents differ in that, or the first
lacked memory, who came first decides for those that come later. A call goes beside others where it is proven that it
has rows of its own at every site that it reads and writes.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
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
from engine.whole_manner import call_by_call
from engine.whole_merging import (
    ALONE,
    BrokenError,
    Rows,
    SettledError,
    Verdict,
    goes_apart,
    judge,
    rows_of,
    settled,
    together,
    try_up_to,
    why_not_so,
)
from engine.whole_side import Side
from engine.whole_sites import told
from engine.whole_state import CallState
from engine.writes import with_member
from polytrace.graph import Node, Read, Write
from scheduling.alike import MOST_CALLS
from scheduling.call_turns import Turn, joined, turns_of
from scheduling.plan import PROLOGUE, Fragment, Member, RequestId

_MOST_VERDICTS = 256
_MOST_TOLD = 4096  # structures of which it is known whether their calls go in the manner
_MOST_CHANGES = 4
_CHANGES = "a call changes settings of the model each time"
_log = logging.getLogger(__name__)


class CallGroups:
    """Of one model. `verdicts` are by structure and likeness, of the settings that the model has."""

    def __init__(self, model: nn.Module, *, is_fixed: bool) -> None:
        """`is_fixed`: nobody sets anything on the model between calls."""
        self._model, self._is_fixed = model, is_fixed
        self.verdicts: OrderedDict[Hashable, Verdict] = OrderedDict()
        self._settings: Hashable = None
        self._goes: OrderedDict[Hashable, bool] = OrderedDict()  # whether calls go in the manner, by structure likewise
        self._changing: set[Hashable] = set()  # structures whose calls change settings each time
        self._num_changes: Counter[Hashable] = Counter()  # of settings, by calls that were looked at beside others
        self.merged: list[tuple[RequestId, ...]] = []  # calls that went as one since somebody took this, by requests

    def run(self, waves: Sequence[tuple[Member, CallState]], alone: Callable[[Turn, CallState], None]) -> None:
        """Runs waves that no gradient is asked of; `alone` runs calls as they are."""
        settings = None if self._is_fixed else settings_of(self._model), torch.get_num_threads()
        if settings != self._settings:  # what was found of others says nothing of these
            self._settings = settings
            self.verdicts.clear()
            self._goes.clear()
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
                self._run_group(parts)

    def take_merged(self) -> tuple[tuple[RequestId, ...], ...]:
        """The calls that went as one since it was asked before, by their requests."""
        merged, self.merged = tuple(self.merged), []
        return merged

    def _parts(self, member: Member, state: CallState) -> Iterator[_Part]:
        """The calls of a wave, those that may go as one together."""
        pending: list[_Part] = []
        for turn in turns_of(member.program, member.wave):
            part = _Part(state, (turn,), self._key(turn, state), turn)
            if pending and (part.key is None or part.key != pending[0].key or len(pending) == MOST_CALLS):
                yield _together(pending)
                pending = []
            if part.key is None:
                yield part
            else:
                pending.append(part)
        if pending:
            yield _together(pending)

    def _key(self, turn: Turn, state: CallState) -> _Key | None:
        """What calls that go together have in common; None of one that goes as it is, whoever is there."""
        if len(turn.invokes) != 1 or state.has_failed:
            return None  # where there are several they wait for each other
        try:
            called = state.arguments(turn.invokes[0])
            key = _Key(repr(state.structure(turn.invokes[0])), likeness(called), _assigned(turn, state))
        except Exception:  # noqa: BLE001  whatever is wrong with what it is given, it says so when it runs
            return None
        return key if goes_apart(called) and self._goes_so(key, called) else None

    def _goes_so(self, key: _Key, called: Called) -> bool:
        """Whether calls of a structure go in the manner of those that may be one; its first one tells."""
        if key.of_calls in self._changing:
            return False
        goes = self._goes.pop(key.of_calls, None)
        if goes is None:
            try:
                why_not = self._why_not_so(key.of_calls, called)
            except BrokenError:
                return False
            goes = why_not is None
            if why_not is not None:
                told = "calls of %s with arguments of one structure are not merged: %s"
                _log.info(told, type(self._model).__name__, why_not)
        self._goes[key.of_calls] = goes
        if len(self._goes) > _MOST_TOLD:
            self._goes.popitem(last=False)
        return goes

    def _why_not_so(self, of_calls: Hashable, called: Called) -> str | None:
        """Looks again at once where a call changes settings, so that the first of a structure tells for all."""
        with suppress(SettledError):
            return why_not_so(self._model, called)
        for num_calls in range(1, _MOST_CHANGES):
            with suppress(SettledError), settled(self._model, called, num_calls):
                return why_not_so(self._model, called)
        self._changing.add(of_calls)
        return _CHANGES

    def _judged(self, of_calls: Hashable, called: Called) -> Verdict:
        """SettledError where a call changes settings, but for one of a model whose calls do so each time."""
        try:
            return judge(self._model, called)
        except SettledError:
            self._num_changes[of_calls] += 1
            if self._num_changes[of_calls] < _MOST_CHANGES:
                raise
            return Verdict(refusal=_CHANGES)

    def _verdict(self, parts: Sequence[_Part]) -> Verdict | None:
        """What is known of calls of one key, of which there are so many now; None where they go one by one."""
        key, calls = parts[0].key, sum(part.num_calls for part in parts)
        assert key is not None, "they may be one"
        called = parts[0].state.arguments(parts[0].turn.invokes[0])
        verdict = self.verdicts.get(key.of_calls)
        if verdict is None:
            try:
                verdict = self._judged(key.of_calls, called)
            except BrokenError:
                return None
            if verdict.refusal is not None:
                told = "calls of %s with arguments of one structure go one by one: %s"
                _log.info(told, type(self._model).__name__, verdict.refusal)
        self.verdicts[key.of_calls] = verdict
        self.verdicts.move_to_end(key.of_calls)
        if len(self.verdicts) > _MOST_VERDICTS:
            self.verdicts.popitem(last=False)
        if verdict.refusal is not None:
            return None
        try_up_to(verdict, min(calls, MOST_CALLS), self._model, called)
        return verdict

    def _run_group(self, parts: Sequence[_Part]) -> None:
        """Runs all of them, as many as may go at a time."""
        verdict = self._verdict(parts) if sum(part.num_calls for part in parts) > 1 else None
        going: list[_Part] = []
        for part in parts:
            if verdict is None or not all(_has_rows(turn, part.state, verdict) for turn in part.turns):
                for one in part.split(1):
                    self._run_one([one], ALONE)
                continue
            most = verdict.most(MOST_CALLS)
            for smaller in part.split(most):
                if going and sum(one.num_calls for one in going) + smaller.num_calls > most:
                    self._run_one(going, verdict)
                    going = []
                going.append(smaller)
        if verdict is not None and going:
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
            with current(None), torch.set_grad_enabled(call.is_graded), torch._C.DisableTorchFunction():
                for start, one in zip(starts, going, strict=False):
                    order, invokes = one.visits.get(keys[place], (PROLOGUE, {}))
                    if invokes:
                        sides = {
                            invoke: RowsSide(shared, kept, keys[place], verdict.rows, start + number, call.is_graded)
                            for invoke, number in invokes.items()
                        }
                        one.run_up_to(order, sides)
            return shared.value

        if keys:
            call = WholeCall({key: place for place, key in enumerate(keys)}, come=come)
            calls = [part.state.arguments(invoke) for part in parts for invoke in part.turn.invokes]
            args, kwargs = together(calls, verdict.size_of(len(calls)))
            with call.recording(), hooked(self._model, call), current(call), suppress(Enough), call_by_call():
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

    def __init__(
        self, shared: Shared, kept: Collection[int], key: Key, rows: Rows, number: int, is_graded: bool
    ) -> None:
        super().__init__(shared.had, _nobody, kept, is_graded=is_graded)
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
        return rows_of(self._whole(selector), self._number, self._rows.get((self._key, selector)))


def _nobody(_tensor: Tensor) -> None:
    """There is no gradient that a write would have to be told to."""


@dataclass(frozen=True, slots=True)
class _Key:
    """What calls that may be one have in common."""

    structure: str
    likeness: Hashable
    assigned: Hashable

    @property
    def of_calls(self) -> Hashable:
        """Whatever is read and written."""
        return self.structure, self.likeness


@dataclass(frozen=True, slots=True)
class _Part:
    """Calls of one request that may go as one, one turn after another."""

    state: CallState
    turns: tuple[Turn, ...]
    key: _Key | None  # None: as they are
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


def _has_rows(turn: Turn, state: CallState, verdict: Verdict) -> bool:
    """Whether all that is read and written is of the call's own rows, or is read and the same for all."""
    for fragment in turn.fragments:
        for node in map(state.program.graph.nodes.__getitem__, fragment.nodes):
            if isinstance(node, (Read, Write)):
                spot = (node.site.module, node.site.port, node.site.visit), node.site.selector
                is_fixed = verdict.rows.get(spot) is None or spot in verdict.fixed
                if spot not in verdict.rows or (isinstance(node, Write) and is_fixed):
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
