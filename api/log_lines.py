"""The lines that the service's processes write into their logs: for people, or JSON for machines.

In JSON each line is an object. One that is about a request has `request`, `tenant`, `user` and `model`, as far as they
are known where it is written: what is logged while a call is answered has those of the call (`about_call`), other code
gives them as `extra=`. Keys, bodies and prompts are never in it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from api.settings import from_environment
from polytrace.errors import UserError

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
FIELDS = ("request", "tenant", "user", "model")  # that say what a line is about
_OF_CALLS = ("method", "route", "status", "seconds", "state", "code")  # of lines that say what was done
_TEXT = "%(asctime)s %(process)d %(name)s: %(message)s"

_call: ContextVar[dict[str, str | None] | None] = ContextVar("polytrace_call", default=None)


def configure(role: str) -> None:
    """This process logs to standard error, as its environment says.

    Raises UserError with the variable when that is no format or level. JSON has what happens to every request, unless
    the level is said; text only what is wrong.
    """
    kind, level = check()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(role) if kind == "json" else logging.Formatter(_TEXT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # others' libraries
    for room in ("api", "cluster"):
        logging.getLogger(room).setLevel(level.upper())


def check() -> tuple[str, str]:
    """The format and the level that the environment says. Raises UserError when they are none."""
    kind: str = from_environment("POLYTRACE_LOG_FORMAT", str, "text")
    if kind not in FORMATS:
        raise UserError(f"POLYTRACE_LOG_FORMAT is {kind!r}; it is text or json")
    level: str = from_environment("POLYTRACE_LOG_LEVEL", str, "info" if kind == "json" else "warning")
    if level not in LEVELS:
        raise UserError(f"POLYTRACE_LOG_LEVEL is {level!r}; it is one of {', '.join(LEVELS)}")
    return kind, level


def begin_call() -> dict[str, str | None]:
    """A call begins: what `about_call` says from now on, in its task and its threads, is of this one."""
    fields: dict[str, str | None] = {}
    _call.set(fields)
    return fields


def about_call(**fields: str) -> None:
    """What the lines of the call that is being answered are about."""
    known = _call.get()
    if known is not None:
        known.update(fields)


class JsonLines(logging.Formatter):
    """A line an object: time (UTC), level, role and id of the process, logger, message, and what it is about."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "process": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        call: Mapping[str, str | None] = _call.get() or {}
        for name in FIELDS + _OF_CALLS:
            value = getattr(record, name, call.get(name))
            if value is not None:
                line[name] = value if isinstance(value, (str, int, float)) else str(value)
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # newlines are escaped: nobody's words become lines of their own
