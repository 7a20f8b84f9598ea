"""The arguments of a call as JSON, on the wire and in a question for the sites of a call.

Numbers, texts and None are themselves. Anything else is an object with one field that says what it is: `t` a tensor by
its name, `d` a dtype, `v` a device, `s` a slice, `r` a range, `l` a list, `u` a tuple, `m` a dict. What comes from
outside is checked field by field.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from polytrace.codec import brief, name_of_float
from polytrace.errors import WireError
from polytrace.given import MAX_DEPTH
from polytrace.graph import Device, DType, Given, Inputs, Invoke
from polytrace.tensors import DTYPES, RawTensor, num_bytes

MAX_ARGUMENTS = 4096  # of one call, those inside of others counted
MAX_TEXT = 1 << 16
SHOWN_BYTES = 1 << 16  # of integers whose values a question for sites tells
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,4})?")
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def inputs_to_json(inputs: Inputs) -> Any:
    """`[[argument, ...], {name: argument, ...}]`."""
    return [[_plain(value) for value in inputs.args], {name: _plain(value) for name, value in inputs.kwargs.items()}]


def inputs_from_json(plain: Any, constants: Collection[str]) -> Inputs:
    """Raises WireError where it is none, or names a tensor that is not there."""
    if not isinstance(plain, list) or len(plain) != 2 or not isinstance(plain[0], list):
        raise WireError("the arguments of a call are a list and an object")
    reader = _Reader(constants)
    return Inputs(args=tuple([reader.value(value, 0) for value in plain[0]]), kwargs=reader.mapping(plain[1], 0))


def encode_inputs(invokes: Sequence[Invoke]) -> list[Any]:
    """Of each invoke of a request, null for those that have prompts; empty when all have."""
    plain = [None if invoke.inputs is None else inputs_to_json(invoke.inputs) for invoke in invokes]
    return plain if any(one is not None for one in plain) else []


def decode_inputs(plain: Any, count: int, constants: Collection[str]) -> list[Inputs | None]:
    """The inverse of `encode_inputs`."""
    if not isinstance(plain, list) or len(plain) != count:
        raise WireError(f"inputs are a list of {count}, one for each invoke")
    return [None if one is None else inputs_from_json(one, constants) for one in plain]


def question(inputs: Inputs, constants: Mapping[str, RawTensor], names: Collection[str]) -> Any:
    """What a call is given, for whoever says what it visits: of tensors dtype and shape, of few integers the values."""
    tensors: dict[str, Any] = {}
    for name in names:
        raw = constants[name]
        is_shown = raw.is_here and "float" not in raw.dtype and len(raw.data) <= SHOWN_BYTES
        tensors[name] = [raw.dtype, raw.shape, base64.b64encode(raw.data).decode() if is_shown else None]
    return {"inputs": inputs_to_json(inputs), "tensors": tensors}


def asked(plain: Any) -> tuple[Inputs, dict[str, RawTensor]]:
    """What a question says; tensors whose values it does not tell have no bytes. Raises WireError."""
    if not isinstance(plain, dict) or plain.keys() != {"inputs", "tensors"} or not isinstance(plain["tensors"], dict):
        raise WireError("a question for sites has the fields inputs and tensors")
    tensors = {name: _tensor(name, entry) for name, entry in plain["tensors"].items()}
    return inputs_from_json(plain["inputs"], tensors), tensors


def _tensor(name: str, entry: Any) -> RawTensor:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str) or entry[0] not in DTYPES:
        raise WireError(f"the tensor {brief(name)} is a dtype, a shape, and bytes or null")
    dtype, shape, text = entry
    is_shape = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
    if not is_shape or len(shape) > 64:
        raise WireError(f"the tensor {brief(name)} has no usable shape")
    data = b""
    if text is not None:
        try:
            data = base64.b64decode(text, validate=True)
        except (TypeError, ValueError) as error:
            raise WireError(f"the tensor {brief(name)} has no usable bytes") from error
        if len(data) != num_bytes(dtype, tuple(shape)):
            raise WireError(f"the tensor {brief(name)} has {len(data)} bytes, {num_bytes(dtype, tuple(shape))} are due")
    return RawTensor(dtype=dtype, shape=tuple(shape), data=memoryview(data))


def _plain(value: Any) -> Any:
    if isinstance(value, Given):
        return {"t": value.name}
    if isinstance(value, DType):
        return {"d": value.name}
    if isinstance(value, Device):
        return {"v": value.name}
    if isinstance(value, (slice, range)):
        return {"s" if isinstance(value, slice) else "r": [value.start, value.stop, value.step]}
    if isinstance(value, Mapping):
        return {"m": {key: _plain(part) for key, part in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"u" if isinstance(value, tuple) else "l": [_plain(part) for part in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": name_of_float(value)}
    return value


def _are_places(parts: list[Any], has_none: bool) -> bool:
    """Whether these are the start, stop and step of a slice or a range."""
    are_plain = all(type(part) is int or (has_none and part is None) for part in parts)
    return are_plain and (has_none or parts[2] != 0)


class _Reader:
    """Builds what plain JSON describes, and counts."""

    def __init__(self, constants: Collection[str]) -> None:
        self._constants = constants
        self._left = MAX_ARGUMENTS

    def value(self, plain: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise WireError(f"a call has more than {MAX_ARGUMENTS} arguments, or nests them deeper than {MAX_DEPTH}")
        if isinstance(plain, str) and len(plain) > MAX_TEXT:
            raise WireError(f"an argument is a text of {len(plain)} characters; at most {MAX_TEXT} are taken")
        if plain is None or isinstance(plain, (bool, int, float, str)):
            return plain
        if not isinstance(plain, dict) or len(plain) != 1:
            raise WireError(f"an argument of a call is plain or has one field, not {brief(plain)}")
        ((kind, part),) = plain.items()
        if kind == "t" and isinstance(part, str) and part in self._constants:
            return Given(part)
        if kind == "d" and isinstance(part, str) and part in DTYPES:
            return DType(part)
        if kind == "v" and isinstance(part, str) and _DEVICE.fullmatch(part):
            return Device(part)
        if kind in ("s", "r") and isinstance(part, list) and len(part) == 3 and _are_places(part, kind == "s"):
            return slice(*part) if kind == "s" else range(*part)
        if kind == "f" and isinstance(part, str) and part in _FLOATS:
            return _FLOATS[part]
        if kind == "m":
            return self.mapping(part, depth + 1)
        if kind in ("l", "u") and isinstance(part, list):
            members = [self.value(one, depth + 1) for one in part]
            return members if kind == "l" else tuple(members)
        raise WireError(f"an argument of a call is none that is known: {brief(kind)} of {brief(part)}")

    def mapping(self, plain: Any, depth: int) -> dict[str, Any]:
        if not isinstance(plain, dict):
            raise WireError(f"arguments by name are an object, not {brief(plain)}")
        return {name: self.value(part, depth) for name, part in plain.items()}
