"""Under which names saved values come back: those of a generation's steps under one name for each line that saves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from polytrace.graph import LOG, Node, NodeId, Ref, Save
from polytrace.storage import State
from polytrace.timing import ENDING, TIMELESS, When

if TYPE_CHECKING:
    from polytrace.recording import Recording


class SaveNames:
    """Of one recording, when its block has ended."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._once: dict[NodeId, str] = {}
        self._stepped: dict[tuple[NodeId, When], str] = {}
        self._lines: dict[
            tuple[str, int, int], str
        ] = {}  # a line, which save of a step it is there, for how many steps
        self._counts: dict[tuple[str, When], int] = {}
        self._num_names = 0

    def saves(
        self, targets: Sequence[NodeId], logged: Collection[NodeId]
    ) -> tuple[list[Node], tuple[str, ...], tuple[When | None, ...]]:
        """All nodes with the saves behind them; of each saved value the name, and its steps where it has any."""
        saves: list[Save] = []
        names: list[str] = []
        whens: list[When | None] = []
        for target, (state, _, where) in zip(targets, self._recording.saved, strict=True):
            log = LOG if target in logged else ""
            when = self._when(state, target)
            if when is None:
                if target not in self._once:
                    self._once[target] = self._new(log)
                    value = self._recording.loops.used(target, where)
                    saves.append(Save(name=self._once[target], value=Ref(value), where=where))
                names.append(self._once[target])
            else:
                if (target, when) not in self._stepped:
                    name = self._stepped[target, when] = self._of_line(where, when, log)
                    saves.append(
                        Save(name=name, value=Ref(target), where=where, step=when.step, num_steps=when.num_steps)
                    )
                names.append(self._stepped[target, when])
            whens.append(when)
        return [*self._recording.nodes, *saves], tuple(names), tuple(whens)

    def _when(self, state: State, target: NodeId) -> When | None:
        """The steps that a value is saved at; None: once, whenever it is there."""
        loops = self._recording.loops
        if not loops.are_used:
            return None
        value, own = self._recording.facts.times.of(target), state.saved_at
        if value.is_loop:
            return value
        if value in (TIMELESS, ENDING) and own is None:
            return None
        if own is None:
            return value if state.is_member and loops.has_owner(target) else None
        if own.is_loop or value == ENDING:
            return None
        if value.step <= own.step:
            return own
        return value if loops.is_of_body(target, own) else None  # else in-place code of a later step has changed it

    def _of_line(self, where: str, when: When, log: str) -> str:
        place = self._counts.get((where, when), 0)
        self._counts[where, when] = place + 1
        key = (where, place, when.num_steps)
        if key not in self._lines:
            self._lines[key] = self._new(log)
        return self._lines[key]

    def _new(self, log: str) -> str:
        self._num_names += 1
        return f"{log}{self._num_names - 1}"
