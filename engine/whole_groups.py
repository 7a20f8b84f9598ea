"""Runs calls of several requests as one call of the module, each request at its own rows.

Which these are follows from each request alone, never from who else is there: one wave, one call, no gradients, values
that stay in memory, sites of which it has rows of its own, and arguments that the gate lets (`engine.whole_merging`).
A request that has nobody beside it is padded to the same least number of calls, so it has the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Selector
from engine.memory import told_out_of_memory
from engine.module_state import kept_tensors, settings_of
from engine.recorder import memory_of
from engine.results import MemorySink
from engine.whole_call import Enough, Key, WholeCall, current, hooked
from engine.whole_merging import Rows, Verdict, judge, rows_of, together
from engine.whole_side import Side
from engine.whole_sites import CallSites, told
from engine.whole_state import CallState
from engine.writes import with_member
from polytrace.errors import GraphError, TooLargeError
from polytrace.given import structure_of
from polytrace.graph import Inputs, Read, Write
from scheduling.call_turns import turns_of
from scheduling.plan import PROLOGUE, Fragment, Member

_MOST_VERDICTS = 256


class CallGroups:
    """Of one model. `verdicts` are by structure; `num_merged` counts calls that went with others."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self.verdicts: OrderedDict[Hashable, Verdict] = OrderedDict()
        self.num_merged = 0
        self._sites = CallSites(model)

    def run(self, members: Sequence[Member], states: list[CallState], anew: Callable[[Member], CallState]) -> list[int]:
        """Runs what may be merged; the numbers of those that go as they are. A state may become another (`anew`)."""
        groups: dict[Hashable, list[int]] = {}
        left = []
        settings = repr(settings_of(self._model))
        for number, (member, state) in enumerate(zip(members, states, strict=True)):
            key = self._key(member, state, settings)
            if key is None:
                left.append(number)
            else:
                groups.setdefault(key, []).append(number)
        for key, numbers in groups.items():
            verdict = self.verdicts[key]
            for start in range(0, len(numbers), verdict.sizes[-1]):
                self._run_group(members, states, numbers[start : start + verdict.sizes[-1]], verdict, anew)
        return left

    def _key(self, member: Member, state: CallState, settings: str) -> Hashable | None:
        """What calls that go together have in common; None of one that goes as it is."""
        program = member.program
        if len(program.waves) > 1 or len(program.invokes) != 1 or program.waves[0].is_taped or state.has_failed:
            return None
        inputs = program.invokes[0].inputs
        if not isinstance(state.sink, MemorySink) or inputs is None:
            return None
        key = repr(structure_of(inputs, program.constants)), settings
        if key not in self.verdicts:
            self.verdicts[key] = self._judged(state, inputs)
            if len(self.verdicts) > _MOST_VERDICTS:
                self.verdicts.popitem(last=False)
        rows = self.verdicts[key].rows
        for node in program.graph.nodes:
            if isinstance(node, (Read, Write)):
                site = (node.site.module, node.site.port, node.site.visit), node.site.selector
                if site not in rows or (isinstance(node, Write) and rows[site] is None):
                    return None
        return key

    def _judged(self, state: CallState, inputs: Inputs) -> Verdict:
        constants = state.program.constants
        try:
            self._sites.of(inputs, constants)
        except (GraphError, TooLargeError) as error:
            return Verdict(refusal=str(error))
        if self._sites.has_looked(inputs, constants):  # what the gate sees of one call would say nothing of another
            return Verdict(refusal="what a call visits depends on values")
        return judge(self._model, state.arguments(0), self._device)

    def _run_group(
        self,
        members: Sequence[Member],
        states: list[CallState],
        numbers: Sequence[int],
        verdict: Verdict,
        anew: Callable[[Member], CallState],
    ) -> None:
        try:
            self._go([_Part.of(members[number], states[number]) for number in numbers], verdict)
            self.num_merged += len(numbers) if len(numbers) > 1 else 0
        except Exception as error:  # noqa: BLE001  whatever code of the model raises: who it is about is found alone
            memory = told_out_of_memory(error)
            if len(numbers) == 1:
                reason = memory or f"{type(self._model).__name__} raised {told(error)}"
                places = [
                    node for one in turns_of(members[numbers[0]].program, 0) for f in one.fragments for node in f.nodes
                ]
                states[numbers[0]].fail(places[0], reason, is_out_of_memory=memory is not None)
                return
            for number in numbers:
                states[number] = anew(members[number])
                self._run_group(members, states, [number], verdict, anew)

    def _go(self, parts: Sequence[_Part], verdict: Verdict) -> None:
        for part in parts:
            part.begin()
        keys = list(dict.fromkeys(key for part in parts for key in part.orders))
        is_in_place = any(part.is_in_place for part in parts)
        kept = frozenset(map(memory_of, kept_tensors(self._model))) if is_in_place else frozenset()

        def come(place: int, value: Any) -> Any:
            key = keys[place]
            with current(None), torch.no_grad():
                for number, part in enumerate(parts):
                    if key in part.orders:
                        side = RowsSide(value, kept, key, verdict.rows, number)
                        part.come(part.orders[key], side)
                        value = side.value
            return value

        call = WholeCall({key: place for place, key in enumerate(keys)}, come=come)
        if keys:
            size = verdict.size_of(len(parts))
            args, kwargs = together([part.state.arguments(0) for part in parts], size)
            with call.recording(), hooked(self._model, call), current(call), suppress(Enough):
                self._model(*args, **kwargs)
        for part in parts:
            part.end()


class RowsSide(Side):
    """What one of several calls in one has of a module's side."""

    def __init__(self, value: Any, kept: Collection[int], key: Key, rows: Rows, number: int) -> None:
        super().__init__(value, lambda _tensor: None, kept)
        self._key, self._rows, self._number = key, rows, number

    def write(self, selector: Selector, given: Tensor, *, in_place: bool) -> None:
        """As of a side, where the rows of others stay what they are."""
        if not in_place:
            self.value = with_member(self.value, selector, self._whole(selector).clone())
            self._tensor(selector).copy_(given)
        else:
            super().write(selector, given, in_place=True)

    def _tensor(self, selector: Selector) -> Tensor:
        return rows_of(self._whole(selector), self._number, self._rows[self._key, selector])


@dataclass(slots=True)
class _Part:
    """One request's part of calls in one."""

    state: CallState
    fragments: dict[int, Fragment]  # that are still to run, by order
    orders: dict[Key, int]  # where it is visited
    is_in_place: bool

    @classmethod
    def of(cls, member: Member, state: CallState) -> _Part:
        fragments = {one.order: one for turn in turns_of(member.program, 0) for one in turn.fragments}
        nodes = member.program.graph.nodes
        orders: dict[Key, int] = {}
        for order, fragment in fragments.items():
            for node in map(nodes.__getitem__, fragment.nodes):
                if isinstance(node, (Read, Write)):
                    orders[node.site.module, node.site.port, node.site.visit] = order
        is_in_place = any(isinstance(node, Write) and node.in_place for node in nodes)
        return cls(state, fragments, orders, is_in_place)

    def begin(self) -> None:
        """Before the call."""
        if PROLOGUE in self.fragments:
            self.state.run(self.fragments.pop(PROLOGUE), None)

    def come(self, order: int, side: Side) -> None:
        """Everything that is due up to a visit."""
        for due in sorted(one for one in self.fragments if one <= order):
            self.state.run_at(self.fragments.pop(due), {0: side} if due == order else {})

    def end(self) -> None:
        """Behind the call: what no visit came to."""
        for due in sorted(self.fragments):
            self.state.run_at(self.fragments.pop(due), {})
