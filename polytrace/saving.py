"""`polytrace.save`: values, and lists, tuples, dicts and dataclasses of them, which have data when the block has ended.

A container is handed back as it is: its members become data where they stand. What is put into a list or dict later in
the block is saved too, as nnsight's users know it. Numbers, texts and the user's own tensors among them stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.ports import Members
from polytrace.storage import is_recorded, state_of

T = TypeVar("T")


def save(thing: T) -> T:
    """Marks every value in `thing` to be returned when the block ends; returns `thing`.

    A tuple or ModelOutput of the model comes back as a tuple or dict of its tensors, each of them saved. Anything that
    has no values in it may be given and is left alone.
    """
    from polytrace.tracing import open_trace

    if isinstance(thing, Members):
        members: T = thing.plain()
        return save(members)
    tracer = open_trace()
    if tracer is not None and not is_recorded(thing):
        tracer.containers.append(thing)  # what is in it at the end of the block is meant
    save_members(thing)
    return thing


def save_members(thing: Any) -> None:
    """Saves the values in a container, as it is now."""
    for value in values_in(thing, set()):
        state = state_of(value)
        state.recording.save(state, value, is_member=value is not thing)


def values_in(thing: Any, seen: set[int]) -> Iterator[Any]:
    """The recorded values in nested containers, in order, each container once."""
    if is_recorded(thing):
        yield thing
        return
    if isinstance(thing, Members):
        raise GraphError(
            f"{thing!r} has several tensors: put one of them here, or polytrace.save(...) of it", where=user_line()
        )
    parts: Any = ()
    if isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = thing
    elif is_dataclass(thing) and not isinstance(thing, type):
        parts = [getattr(thing, field.name) for field in fields(thing)]
    if not parts or id(thing) in seen:
        return
    seen.add(id(thing))
    for part in parts:
        yield from values_in(part, seen)
