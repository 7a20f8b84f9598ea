"""What a call of a model is given, as Python has it, brought to data (`polytrace.given`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polytrace.errors import GraphError
from polytrace.given import MAX_DEPTH
from polytrace.graph import DType, Given, Inputs
from polytrace.literals import dtype_name, scalar
from polytrace.storage import is_recorded
from polytrace.tensors import DTYPES

_PLAIN = (bool, int, float, str, type(None))


def inputs_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], add: Callable[[Any], str], where: str) -> Inputs:
    """The arguments of a call as data; `add` takes a tensor or array and gives its name. Raises GraphError."""
    made = Inputs(
        args=tuple([_given(value, add, where, f"argument {place}", 0) for place, value in enumerate(args)]),
        kwargs={name: _given(value, add, where, f"the argument {name}", 0) for name, value in kwargs.items()},
    )
    if not args and not kwargs:
        raise GraphError("a call needs arguments: model.trace(x) or model.trace(name=x)", where=where)
    return made


def _given(value: Any, add: Callable[[Any], str], where: str, what: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise GraphError(f"{what} is nested more than {MAX_DEPTH} deep", where=where)
    if isinstance(value, _PLAIN):
        return value
    if is_recorded(value):
        raise GraphError(
            f"{what} is a value of this trace, and arguments are known before anything runs: save it and give it to a "
            "trace behind this one, or call with a tensor and write to the site's `.input`",
            where=where,
        )
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise GraphError(f"{what} has keys that are no texts", where=where)
        return {key: _given(part, add, where, f"{what}[{key!r}]", depth + 1) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_given(part, add, where, f"{what}[{place}]", depth + 1) for place, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if (number := scalar(value)) is not None:
        return number
    if not hasattr(value, "__array__") and (dtype := dtype_name(value)) in DTYPES:
        return DType(str(dtype))
    if not hasattr(value, "untyped_storage") and not hasattr(value, "__array__"):
        raise GraphError(
            f"{what} is a {type(value).__name__}: a call takes tensors, arrays, numbers and texts; a processor makes "
            "these of images and sound, `model.processor(...)` where the model came with one",
            where=where,
        )
    return Given(add(value))
