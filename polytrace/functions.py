"""The op table as functions, for programs without torch: `functions.softmax(value, dim=-1)`, `functions.cat([a, b])`.

With torch, torch's own functions are recorded as well and read better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polytrace.arguments import normalised
from polytrace.errors import GraphError
from polytrace.grammar import unknown_op
from polytrace.lines import user_line
from polytrace.ops import OPS
from polytrace.storage import recorded_in
from polytrace.values import record


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in OPS:
        raise unknown_op(name, user_line())

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(recorded_in((args, tuple(kwargs.values()))), None) is None:
            raise GraphError(
                f"functions.{name} works on values of a trace, and there is none among these", where=user_line()
            )
        positional, named = normalised(name, args, kwargs)
        return record(name, positional, named)

    function.__name__ = name
    return function


def __dir__() -> list[str]:
    return sorted(OPS)
