"""polytrace: many traces, one forward pass.

    model = polytrace.connect("http://127.0.0.1:8765")    # or polytrace.load("openai-community/gpt2")
    with model.trace("The Eiffel Tower is in") as tracer:
        hidden = model.model.layers[5].output[0].save()

Importing this imports neither torch, numpy, transformers nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace.errors import (
    CancelledError,
    CapacityError,
    ForbiddenError,
    GraphError,
    KeyRefusedError,
    MissingError,
    NotFoundError,
    PolytraceError,
    QuotaError,
    RunError,
    ServiceError,
    TooLargeError,
    UserError,
    WireError,
)
from polytrace.program import __version__ as __version__

if TYPE_CHECKING:
    from polytrace import functions as functions
    from polytrace import optim as optim
    from polytrace.choice import cond
    from polytrace.client import connect, job, load, models
    from polytrace.edits.adapters import delta, lora
    from polytrace.jobs import Job
    from polytrace.keeping import Kept, NamedState
    from polytrace.maps.combining import count as count
    from polytrace.maps.combining import covariance as covariance
    from polytrace.maps.combining import max as max
    from polytrace.maps.combining import mean as mean
    from polytrace.maps.combining import min as min
    from polytrace.maps.combining import sum as sum
    from polytrace.maps.combining import top_k as top_k
    from polytrace.maps.mapping import Map
    from polytrace.model import Model
    from polytrace.saving import save
    from polytrace.step_values import came
    from polytrace.tracing import Tracer

__all__ = [
    "CancelledError",
    "CapacityError",
    "ForbiddenError",
    "GraphError",
    "Job",
    "Kept",
    "KeyRefusedError",
    "Map",
    "MissingError",
    "Model",
    "NamedState",
    "NotFoundError",
    "PolytraceError",
    "QuotaError",
    "RunError",
    "ServiceError",
    "TooLargeError",
    "Tracer",
    "UserError",
    "WireError",
    "came",
    "cond",
    "connect",
    "delta",
    "job",
    "load",
    "lora",
    "models",
    "save",
]

_ROOMS = {
    "came": "step_values",
    "cond": "choice",
    "connect": "client",
    "delta": "edits.adapters",
    "functions": "functions",
    "Job": "jobs",
    "job": "client",
    "Kept": "keeping",
    "load": "client",
    "lora": "edits.adapters",
    "Map": "maps.mapping",
    "models": "client",
    "Model": "model",
    "NamedState": "keeping",
    "optim": "optim",
    "save": "saving",
    "Tracer": "tracing",
    # not in __all__: `from polytrace import *` would hide Python's own sum, max and min
    **dict.fromkeys(("sum", "mean", "max", "min", "count", "covariance", "top_k"), "maps.combining"),
}


def __getattr__(name: str) -> Any:
    """What needs more than a moment to import comes when it is asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'polytrace' has no attribute {name!r}")
    from importlib import import_module

    room = import_module(f"polytrace.{_ROOMS[name]}")
    return room if name == _ROOMS[name] else getattr(room, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
