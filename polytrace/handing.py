"""What becomes of saved values when a request has ended: tensors, sequences of them, or nothing where no step came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.errors import ServiceError
from polytrace.graph import name_at
from polytrace.step_values import Steps
from polytrace.storage import state_of
from polytrace.timing import When

if TYPE_CHECKING:
    from polytrace.kinds import Kind
    from polytrace.recording import Recording


def hand_out(recording: Recording, names: Sequence[str], results: Mapping[str, Any], kind: Kind) -> None:
    """Every saved value becomes its result. Raises ServiceError when one is missing that cannot be."""
    plan = _Plan(recording, names, results, kind)
    for number, (_, value, _) in enumerate(recording.saved):
        plan.give(number, value)


class _Plan:
    def __init__(self, recording: Recording, names: Sequence[str], results: Mapping[str, Any], kind: Kind) -> None:
        self._recording, self._names, self._results, self._kind = recording, names, results, kind
        self._given: set[str] = set()  # results that a value has become: the next one gets a copy
        self._sequences: dict[str, Steps] = {}
        for name, when in zip(names, recording.saved_steps, strict=True):
            if when is not None:
                self._sequences.setdefault(name, self._sequence(name))

    def give(self, number: int, value: Any) -> None:
        """One saved value becomes what it is."""
        name, when = self._names[number], self._recording.saved_steps[number]
        if when is not None and when.is_loop:
            self._kind.become_steps(value, self._sequences[name])
            return
        full = name if when is None else name_at(name, when.step)
        if full not in self._results:
            self._lose(value, when, full)
        else:
            result = self._kind.another(self._results[full]) if full in self._given else self._results[full]
            self._given.add(full)
            self._kind.become(value, result)
        if when is not None:
            value.__dict__["steps"] = self._sequences[name]

    def _lose(self, value: Any, when: When | None, name: str) -> None:
        if not self._recording.goes_on:
            raise ServiceError(f"the service gave nothing for {name!r}")
        step = f"step {when.step} never came" if when is not None else "a step that it is made of never came"
        state_of(value).gone = (
            f"this value has no data, for {step}: what it was read from had ended before. polytrace.came(values) are "
            "those of a list that are there"
        )

    def _sequence(self, name: str) -> Steps:
        """All that came under one name."""
        prefix = name_at(name, 0)[:-1]
        own = [full for full in self._results if full.startswith(prefix)]
        return Steps({int(full.removeprefix(prefix)): self._results[full] for full in own})
