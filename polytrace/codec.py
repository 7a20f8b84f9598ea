"""Frozen dataclasses to plain JSON values and back, strictly.

Owns the table of what a field may be: bool, int, float, str, None, enums, `NewType`s, nested dataclasses, tuples,
string-keyed mappings, unions of these that JSON can tell apart, and `Any` for JSON itself. Knows nothing of what the
dataclasses mean.

Invariants
- `from_json(type(x), to_json(x)) == x`, also for non-finite floats, which travel as strings: the output is strict JSON.
- Whatever is decoded, the only error is `WireError`, and it names the path of the field.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from polytrace.errors import WireError

T = TypeVar("T")
Decoder = Callable[[Any, str], Any]

NON_FINITE: dict[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
MAX_JSON_DEPTH = 64


def to_json(value: Any) -> Any:
    """The value as dicts, lists, strings, finite numbers, booleans and None."""
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else name_of_float(value)
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a mapping travels with string keys only")
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(part) for part in value]
    raise TypeError(f"a {type(value).__name__} does not travel as JSON")


def from_json(kind: type[T], plain: Any) -> T:
    """The `kind` that `plain` describes: every field checked; unknown and missing ones refused (defaults may miss)."""
    return _decoder(kind)(plain, kind.__name__)  # type: ignore[no-any-return,arg-type]


def name_of_float(value: float) -> str:
    """How a non-finite float travels."""
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def brief(plain: Any) -> str:
    """A value from outside, short enough for a message; never walks into lists or objects, however deep they are."""
    if isinstance(plain, (list, dict)):
        return f"a {type(plain).__name__} of {len(plain)}"
    text = repr(plain)
    return text if len(text) <= 60 else text[:57] + "..."


@cache
def _decoder(kind: Any) -> Decoder:
    """The function that checks and builds one kind of value, made once a kind."""
    if hasattr(kind, "__supertype__"):
        return _decoder(kind.__supertype__)
    if kind is Any:
        return _json
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(kind, arguments)
    if origin in (tuple, list):
        return _sequence(origin, arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*arguments)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"{kind} does not travel as JSON")


def _boolean(plain: Any, path: str) -> bool:
    if not isinstance(plain, bool):
        raise _wrong(path, "true or false", plain)
    return plain


def _integer(plain: Any, path: str) -> int:
    if not isinstance(plain, int) or isinstance(plain, bool):
        raise _wrong(path, "an integer", plain)
    return plain


def _float(plain: Any, path: str) -> float:
    if isinstance(plain, str) and plain in NON_FINITE:
        return NON_FINITE[plain]
    if not isinstance(plain, (int, float)) or isinstance(plain, bool):
        raise _wrong(path, "a number", plain)
    try:
        return float(plain)
    except OverflowError as error:
        raise _wrong(path, "a number", "an integer beyond every float") from error


def _string(plain: Any, path: str) -> str:
    if not isinstance(plain, str):
        raise _wrong(path, "a string", plain)
    return plain


def _none(plain: Any, path: str) -> None:
    if plain is not None:
        raise _wrong(path, "null", plain)


def _json(plain: Any, path: str, depth: int = 0) -> Any:
    if depth > MAX_JSON_DEPTH:
        raise WireError(f"{path} nests deeper than {MAX_JSON_DEPTH}")
    if isinstance(plain, dict):
        return {_string(key, path): _json(part, path, depth + 1) for key, part in plain.items()}
    if isinstance(plain, list):
        return [_json(part, path, depth + 1) for part in plain]
    if plain is None or isinstance(plain, (bool, int, float, str)):
        return plain
    raise _wrong(path, "JSON", plain)


_SCALARS: dict[Any, Decoder] = {
    bool: _boolean,
    int: _integer,
    float: _float,
    str: _string,
    type(None): _none,
    None: _none,
}


def _union(kind: Any, arguments: tuple[Any, ...]) -> Decoder:
    members = tuple(_decoder(argument) for argument in arguments)

    def decode(plain: Any, path: str) -> Any:
        refusals = []
        for member in members:
            try:
                return member(plain, path)
            except WireError as error:
                refusals.append(error.message)
        raise WireError("; ".join(refusals))

    return decode


def _sequence(origin: type, arguments: tuple[Any, ...]) -> Decoder:
    is_open = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
    members = tuple(_decoder(argument) for argument in arguments if argument is not Ellipsis)

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, list):
            raise _wrong(path, "a list", plain)
        if is_open:
            return origin(members[0](part, f"{path}[{i}]") for i, part in enumerate(plain))
        if len(plain) != len(members):
            raise WireError(f"{path} has {len(plain)} members where {len(members)} belong")
        return tuple(member(part, f"{path}[{i}]") for i, (member, part) in enumerate(zip(members, plain, strict=True)))

    return decode


def _mapping(key_kind: Any, value_kind: Any) -> Decoder:
    decode_key, decode_value = _decoder(key_kind), _decoder(value_kind)

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, dict):
            raise _wrong(path, "an object", plain)
        return {decode_key(key, path): decode_value(part, f"{path}.{key}") for key, part in plain.items()}

    return decode


def _enum(kind: type[Enum]) -> Decoder:
    members = {member.value: member for member in kind}

    def decode(plain: Any, path: str) -> Enum:
        if not isinstance(plain, (str, int)) or plain not in members:
            raise _wrong(path, "one of " + ", ".join(repr(value) for value in members), plain)
        return members[plain]

    return decode


def _dataclass(kind: Any) -> Decoder:
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    decoders = {field.name: _decoder(hints[field.name]) for field in fields}
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def decode(plain: Any, path: str) -> Any:
        if not isinstance(plain, dict):
            raise _wrong(path, "an object", plain)
        if unknown := plain.keys() - decoders.keys():
            raise WireError(f"{path} has unknown fields: {', '.join(sorted(map(repr, unknown)))}")
        if missing := required - plain.keys():
            raise WireError(f"{path} lacks the fields {', '.join(sorted(missing))}")
        return kind(**{name: decoders[name](part, f"{path}.{name}") for name, part in plain.items()})

    return decode


def _wrong(path: str, expected: str, plain: Any) -> WireError:
    return WireError(f"{path} is {brief(plain)} where {expected} belongs")
