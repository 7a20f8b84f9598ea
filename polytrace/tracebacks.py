"""What is shown of an error where polytrace's code ends and the user's goes on: their frames, the message, their line.

What a block or call of polytrace's raises has been found deep inside, and these depths say nothing to whoever wrote the
block. At such an edge stands

    except PolytraceError as error:
        shorten(error)
        raise  # bare: it adds no frame of its own

POLYTRACE_TRACEBACK=full keeps every frame and every cause.
"""

from __future__ import annotations

import linecache
import os
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

from polytrace import environment
from polytrace.errors import PolytraceError, ServiceError
from polytrace.lines import is_users, user_file, user_line

P = ParamSpec("P")
T = TypeVar("T")


def edge(function: Callable[P, T]) -> Callable[P, T]:
    """A function that users call, as such an edge."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except PolytraceError as error:
            shorten(error)
            raise

    return call


def shorten(error: PolytraceError) -> None:
    """Takes all frames but the user's out of what is shown of an error, and adds the text of the line that it blames.

    Of what caused it that stays which has frames of the user's, whose own module or function has failed. A fault of
    ours that has a cause stays whole. The text is a note: `str(error)` stays as it is.
    """
    entries = _users(error.__traceback__)
    if error.where is not None and error.where not in [user_line(), *map(_line, entries)]:  # these are shown anyway
        text = _text(error.where)
        if text is not None and text not in getattr(error, "__notes__", ()):
            error.add_note(text)
    cause = error.__cause__
    if environment.has_full_tracebacks() or (isinstance(error, ServiceError) and cause is not None):
        return
    if cause is not None and (own := _users(cause.__traceback__)):
        cause.__traceback__, cause.__suppress_context__ = _chained(own), True
    else:
        error.__cause__ = None
    error.__traceback__, error.__suppress_context__ = _chained(entries), True


def _users(traceback: TracebackType | None) -> list[TracebackType]:
    """Those of its entries that are frames of the user's."""
    entries = []
    while traceback is not None:
        if is_users(traceback.tb_frame.f_code.co_filename):
            entries.append(traceback)
        traceback = traceback.tb_next
    return entries


def _chained(entries: list[TracebackType]) -> TracebackType | None:
    """A traceback of these alone."""
    made = None
    for entry in reversed(entries):
        made = TracebackType(made, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return made


def _line(entry: TracebackType) -> str:
    return f"{os.path.basename(entry.tb_frame.f_code.co_filename)}:{entry.tb_lineno}"


def _text(where: str) -> str | None:
    """The source at a `file:line` that this process has told, indented; None where it cannot be read."""
    file = user_file(where)
    if file is None:
        return None
    linecache.checkcache(file)
    text = linecache.getline(file, int(where.rpartition(":")[2])).strip()
    return f"    {text}" if text else None
