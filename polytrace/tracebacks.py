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
from polytrace.lines import is_ours, is_torchs, is_users, user_file, user_line

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
    """Takes all frames of ours out of what is shown of an error, and adds the text of the line that it blames.

    The user's stay, and those of whoever called us for them. Of what caused it that stays which has frames of the
    user's, whose own module or function has failed; and what the user was handling when it came. A fault of ours that
    has a cause stays whole. The text is a note: `str(error)` stays as it is.
    """
    entries = _callers(error.__traceback__)
    if error.where is not None and error.where not in [user_line(), *map(_line, entries)]:  # these are shown anyway
        _note(error, _text(error.where))
    cause = error.__cause__
    if _is_full(error) or (isinstance(error, ServiceError) and cause is not None):
        return
    handled = _handled(error)
    if cause is not None and (own := _users(cause.__traceback__)):
        if handled is not cause:  # else it is the user's own, as it is
            cause.__traceback__, cause.__context__ = _chained(own), _handled(cause)
            cause.__suppress_context__ = False
        error.__context__ = cause
    else:
        error.__cause__, error.__context__, error.__suppress_context__ = None, handled, False
    error.__traceback__ = _chained(entries)


def _is_full(error: PolytraceError) -> bool:
    """Whether all is to be shown. A value that is no such choice is told beside the error, and hides nothing."""
    try:
        return environment.has_full_tracebacks()
    except ValueError as wrong:
        _note(error, str(wrong))
        return True


def _handled(error: BaseException) -> BaseException | None:
    """What the user was handling when an error came: it was caught in their code, not in ours."""
    seen = [error]
    while (context := seen[-1].__context__) is not None and all(context is not one for one in seen):
        first = context.__traceback__
        if first is not None and not is_ours(_file(first)) and _users(first):
            return context
        seen.append(context)
    return None


def _callers(traceback: TracebackType | None) -> list[TracebackType]:
    """Those of its entries that are frames of the user's, or of a library that called us."""
    entries, has_called = [], False
    while traceback is not None:
        name = _file(traceback)
        has_called = has_called or is_ours(name)
        if is_users(name) or not (has_called or is_torchs(name)):
            entries.append(traceback)
        traceback = traceback.tb_next
    return entries


def _users(traceback: TracebackType | None) -> list[TracebackType]:
    """Those of its entries that are frames of the user's."""
    entries = []
    while traceback is not None:
        if is_users(_file(traceback)):
            entries.append(traceback)
        traceback = traceback.tb_next
    return entries


def _file(entry: TracebackType) -> str:
    return entry.tb_frame.f_code.co_filename


def _note(error: PolytraceError, text: str | None) -> None:
    if text is not None and text not in getattr(error, "__notes__", ()):
        error.add_note(text)


def _chained(entries: list[TracebackType]) -> TracebackType | None:
    """A traceback of these alone."""
    made = None
    for entry in reversed(entries):
        made = TracebackType(made, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return made


def _line(entry: TracebackType) -> str:
    return f"{os.path.basename(_file(entry))}:{entry.tb_lineno}"


def _text(where: str) -> str | None:
    """The source at a `file:line` that this process has told, indented; None where it cannot be read."""
    file = user_file(where)
    if file is None:
        return None
    linecache.checkcache(file)
    text = linecache.getline(file, int(where.rpartition(":")[2])).strip()
    return f"    {text}" if text else None
