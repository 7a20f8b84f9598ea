"""Which Python values stand in a graph as they are: numbers, dtypes, indices. Imports neither torch nor numpy."""

from __future__ import annotations

from typing import Any

from polytrace.graph import Operand

_PYTHON_DTYPES: dict[type, str] = {float: "float64", int: "int64", bool: "bool"}


def is_basic(index: Operand) -> bool:
    """Whether an index only selects and slices, so that the result is a true view."""
    for part in index if isinstance(index, tuple) else (index,):
        if not (type(part) is int or isinstance(part, slice) or part is None or part is Ellipsis):
            return False
    return True


def first_int(index: Any) -> int | None:
    """The literal integer that an index begins with, None when it begins otherwise."""
    first = index[0] if isinstance(index, tuple) and index else index
    number = scalar(first)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def scalar(value: Any) -> bool | int | float | None:
    """A Python or numpy scalar as a Python number, None when the value is neither."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):  # subclasses too: enums of numbers
        return int(value) if isinstance(value, int) else float(value)
    if type(value).__module__ == "numpy" and not hasattr(value, "__len__") and hasattr(value, "item"):
        number = value.item()
        return number if isinstance(number, (bool, int, float)) else None
    return None


def dtype_name(value: Any) -> str | None:
    """torch's name of a dtype of torch, numpy or Python, None when the value is none."""
    if isinstance(value, type):
        if value in _PYTHON_DTYPES:
            return _PYTHON_DTYPES[value]
        return value.__name__.rstrip("_") if value.__module__ == "numpy" else None
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if kind.__module__ in ("numpy", "numpy.dtypes") and hasattr(value, "itemsize") and hasattr(value, "newbyteorder"):
        return str(value.name) if not hasattr(value, "__array__") else None
    return None
