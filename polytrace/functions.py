"""The op table as functions, for programs without torch: `functions.softmax(value, dim=-1)`, `functions.cat([a, b])`.

With torch, torch's own functions are recorded as well and read better. What has sizes alone (`torch.randn(3)`) torch
makes where it is written; `functions.randn(3)` in a trace is drawn where the values are, from the request's seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polytrace.arguments import normalised
from polytrace.errors import GraphError
from polytrace.grammar import unknown_op
from polytrace.keeping import recorded
from polytrace.lines import user_line
from polytrace.ops import OPS
from polytrace.storage import recorded_in
from polytrace.tracing import open_trace
from polytrace.values import record


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in OPS:
        raise unknown_op(name, user_line())

    def function(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = recorded(args), {key: recorded(value) for key, value in kwargs.items()}
        positional, named = normalised(name, args, kwargs)
        if next(recorded_in((args, tuple(kwargs.values()))), None) is not None:
            return record(name, positional, named)
        tracer = open_trace()
        if not OPS[name].is_made or tracer is None:
            told = "works on values of a trace, and there is none among these"
            if OPS[name].is_made:
                told = "is made by a trace, and none is open here"
            raise GraphError(f"functions.{name} {told}", where=user_line())
        return record(name, positional, named, tracer.recording)

    function.__name__ = name
    return function


def __dir__() -> list[str]:
    return sorted(OPS)
