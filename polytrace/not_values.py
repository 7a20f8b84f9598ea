"""Modules and tuples are no values: arithmetic, indexing and torch functions on them say what was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class NotAValue:
    """What a trace has beside values. Python's operators and torch's functions on it are refused in its own words."""

    __slots__ = ()

    def _refuse_as_value(self) -> NoReturn:
        """Raises GraphError: what this is, and how to get a value from it."""
        raise NotImplementedError

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse_as_value()

    def __delitem__(self, index: Any) -> None:
        self._refuse_as_value()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_among((args, kwargs or {}))
        return NotImplemented


def refuse_among(values: Any) -> None:
    """Raises GraphError when there is something among (nested) arguments that is no value."""
    if isinstance(values, NotAValue):
        values._refuse_as_value()
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            refuse_among(value)


def _operator(name: str) -> Callable[..., Any]:
    def refuse(self: NotAValue, *others: Any) -> NoReturn:
        self._refuse_as_value()

    refuse.__name__ = name
    return refuse


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHERS = ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "float", "int", "index", "round")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(NotAValue, f"__{_name}__", _operator(f"__{_name}__"))
