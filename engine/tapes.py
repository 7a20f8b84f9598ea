"""The tapes that a shard keeps, until nobody runs their passes backwards any more."""

from __future__ import annotations

from collections.abc import Sequence

from engine.fragments import RequestState
from engine.tape import Tape
from scheduling.levels import Levels
from scheduling.plan import PassId, Plan, RequestId


class Tapes:
    """By pass."""

    def __init__(self) -> None:
        self._tapes: dict[PassId, Tape] = {}
        self._passes: dict[tuple[RequestId, int], PassId] = {}  # in which pass a request's wave ran

    def begin(self, plan: Plan, states: Sequence[RequestState], levels: Levels) -> Tape:
        """The tape of a pass, for its members."""
        tape = self._tapes[plan.pass_id] = Tape(cuts=frozenset(plan.cuts), reruns=_reruns(plan, levels))
        for member, state in zip(plan.members, states, strict=True):
            request = member.program.request
            tape.rows[request] = state.rows
            tape.holders.add((request, member.wave))
            self._passes[request, member.wave] = plan.pass_id
        return tape

    def of(self, pass_id: PassId) -> Tape:
        """That of a pass which somebody runs backwards."""
        return self._tapes[pass_id]

    def free(self, plan: Plan) -> None:
        """A pass has run: its members no longer need some."""
        for member in plan.members:
            for wave in member.program.waves[member.wave].frees:
                self._release(member.program.request, wave)

    def forget(self, request: RequestId) -> None:
        """A request has ended."""
        for holder, wave in [held for held in self._passes if held[0] == request]:
            self._release(holder, wave)

    def clear(self) -> None:
        """Gives the memory back."""
        self._tapes.clear()
        self._passes.clear()

    @property
    def num_bytes(self) -> int:
        """Of what operations keep, weights not counted."""
        return sum(tape.saved.num_bytes for tape in self._tapes.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._tapes

    def _release(self, request: RequestId, wave: int) -> None:
        pass_id = self._passes.pop((request, wave), None)
        if pass_id is None:
            return
        tape = self._tapes[pass_id]
        tape.holders.discard((request, wave))
        if not tape.holders:
            del self._tapes[pass_id]


def _reruns(plan: Plan, levels: Levels) -> frozenset[int]:
    """Layers that are run again on the way back: where that is planned, those inside of which no gradient stops."""
    if not plan.reruns:
        return frozenset()
    return frozenset(range(levels.count)) - {levels.of(order) for order in plan.cuts if levels.is_inside(order)}
