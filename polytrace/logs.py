"""`tracer.log`: values that the user sees while the request runs, each when the pass that makes it has ended.

A log is a saved value whose name begins with `graph.LOG`; the service hands those out with its word of progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import MAX_LOG_BYTES
from polytrace.lines import user_line
from polytrace.storage import is_recorded, state_of
from polytrace.tensors import itemsize
from polytrace.values import shape_of

if TYPE_CHECKING:
    from polytrace.tracing import Tracer


@dataclass(slots=True)
class Log:
    """One line: a name, a value that has its data once the pass that makes it has ended, and the user's own line."""

    name: str
    value: Any
    where: str


def add_log(tracer: Tracer, first: Any, second: Any) -> None:
    """`tracer.log(value, "name")` or `tracer.log("name", value)`. Raises TooLargeError for what is no small value."""
    where = user_line()
    value, name = (second, first) if isinstance(first, str) else (first, second)
    if not is_recorded(value) or not (name is None or isinstance(name, str)):
        raise GraphError(
            f"tracer.log takes a value of the trace and a name, not {_kind(first)} and {_kind(second)}", where=where
        )
    shape = shape_of(value)
    size = itemsize(shape.dtype)
    for length in shape.shape:
        size *= length
    if size > MAX_LOG_BYTES:
        raise TooLargeError(
            f"this value has {size:,} bytes ({list(shape.shape)} of {shape.dtype}) and a log at most "
            f"{MAX_LOG_BYTES:,}: log a part of it or its norm, or .save() it",
            where=where,
        )
    state = tracer.recording.snapshot(state_of(value))
    log = Log(name=name or where, value=tracer.wrap(state), where=where)
    tracer.recording.log(state, log.value)
    tracer.logs.append(log)


class LogPrinter:
    """Prints each log once, when its value is there; in the order of the program among those that come together."""

    def __init__(self, logs: Sequence[Log], names: Mapping[int, str]) -> None:
        """`names` are what the values come back under, by the place of their log."""
        self._logs = logs
        self._waiting = dict(names)

    def hear(self, values: Mapping[str, Any]) -> None:
        """Takes saved values by name."""
        for place, name in [*self._waiting.items()]:
            if name in values:
                del self._waiting[place]
                print(f"{self._logs[place].name}: {values[name]}", flush=True)


def _kind(thing: Any) -> str:
    return "nothing" if thing is None else f"a {type(thing).__name__}"
