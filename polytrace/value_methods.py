"""The op table as methods and operators of a value class.

They record directly: torch's own argument parser would refuse numpy arrays, and say nothing of the nearest names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polytrace.arguments import normalised
from polytrace.literals import scalar
from polytrace.ops import BY_TORCH_NAME
from polytrace.values import record, record_in_place

# reflected operator -> the op whose operands it swaps; on a number torch has its own form (`1 / x` is a reciprocal)
_REFLECTED = {
    "__rsub__": "sub",
    "__rtruediv__": "div",
    "__rdiv__": "div",
    "__rfloordiv__": "floor_divide",
    "__rmod__": "remainder",
    "__rpow__": "pow",
    "__rmatmul__": "matmul",
}
_IN_PLACE = frozenset(
    ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)


def install(kind: type, own: frozenset[str]) -> None:
    """Gives a value class every method, operator and in-place form of the op table, except its `own`."""
    for name, spec in BY_TORCH_NAME.items():
        room, _, method = name.partition(".")
        if room != "Tensor" or method in own:
            continue
        if method.endswith("_") and not method.endswith("__"):  # what torch has in place only
            setattr(kind, method, _in_place(spec.name))
            continue
        setattr(kind, method, _reflected(spec.name, _REFLECTED[method]) if method in _REFLECTED else _method(spec.name))
        bare = method.strip("_")
        if not method.startswith("__"):
            setattr(kind, f"{method}_", _in_place(spec.name))
        elif f"i{bare}" in _IN_PLACE:
            setattr(kind, f"__i{bare}__", _in_place(spec.name))


def _method(op: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        positional, named = normalised(op, (self, *args), kwargs)
        return record(op, positional, named)

    return method


def _reflected(op: str, swapped: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return record(swapped, (other, self), {}) if scalar(other) is None else record(op, (self, other), {})

    return method


def _in_place(op: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        positional, named = normalised(op, args, kwargs)
        return record_in_place(op, self, positional, named)

    return method
