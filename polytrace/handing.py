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
    rows = [*zip([value for _, value, _ in recording.saved], names, recording.saved_steps, strict=True)]
    given: set[str] = set()
    own: list[Any] = []  # each value's own result: two that were one get a copy each
    for _, name, when in rows:
        full = name if when is None else name_at(name, when.step)
        result = results.get(full) if when is None or not when.is_loop else None
        own.append(kind.another(result) if result is not None and full in given else result)
        given.add(full)
    sequences: dict[str, dict[int, Any]] = {}  # by name: the values of steps that came
    for (value, name, when), result in zip(rows, own, strict=True):
        if when is not None and when.is_loop:
            steps = {step: results.get(name_at(name, step)) for step in range(when.step, when.last + 1)}
            kind.become_steps(value, Steps({step: one for step, one in steps.items() if one is not None}))
            continue
        if result is None:
            _lose(recording, value, when, name)
        else:
            kind.become(value, result)
        if when is not None:
            came = sequences.setdefault(name, {})
            if result is not None:
                came[when.step] = value
    for value, name, when in rows:
        if when is not None and not when.is_loop:
            value.__dict__["steps"] = Steps(sequences[name])


def _lose(recording: Recording, value: Any, when: When | None, name: str) -> None:
    """A value stays without data, which is no failure where a generation ended before."""
    if not recording.goes_on:
        raise ServiceError(f"the service gave nothing for the saved value {name!r}")
    step = f"step {when.step} never came" if when is not None else "a step that it is made of never came"
    state_of(value).gone = (
        f"this value has no data, for {step}: its prompt's generation had ended before. polytrace.came(values) are "
        "those of a list that are there, and value.steps has what one line saved at the steps that came"
    )
