"""What a call of a model is given, as Python has it, brought to data (`polytrace.given`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polytrace.constants import requires_gradients
from polytrace.errors import GraphError, TooLargeError
from polytrace.given import MAX_DEPTH
from polytrace.graph import Device, DType, Given, Inputs
from polytrace.literals import dtype_name, scalar
from polytrace.storage import is_recorded, state_of
from polytrace.tensors import DTYPES, RawTensor, num_bytes

if TYPE_CHECKING:
    from polytrace.recording import Recording

_PLAIN = (bool, int, float, str, type(None))


class Calling:
    """The arguments of one call on their way to data.

    A value of the trace is a tensor of zeros among them, and `written` says where it is written when the call begins:
    so it goes from call to call without leaving the service. A tensor that requires gradients is written too, and so
    has those of the whole program.
    """

    def __init__(self, recording: Recording, where: str, hint: Callable[[], str]) -> None:
        """`hint` gives what else is said of an object that is no data."""
        self._recording = recording
        self._where = where
        self._hint = hint
        self.written: list[tuple[tuple[int | str, ...], Any]] = []  # selectors of `inputs`, and values

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """The arguments as data; their tensors are constants of the recording. Raises GraphError."""
        if not args and not kwargs:
            raise GraphError("a call needs arguments: model.trace(x) or model.trace(name=x)", where=self._where)
        return Inputs(
            args=tuple([self._given(value, (0, place), f"argument {place}") for place, value in enumerate(args)]),
            kwargs={name: self._given(value, (1, name), f"the argument {name}") for name, value in kwargs.items()},
        )

    def _given(self, value: Any, way: tuple[int | str, ...], what: str) -> Any:
        where = self._where
        if len(way) > MAX_DEPTH:
            raise GraphError(f"{what} is nested more than {MAX_DEPTH - 2} deep", where=where)
        if isinstance(value, _PLAIN):
            return value
        if is_recorded(value):
            return self._later(value, way, what)
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise GraphError(f"{what} has keys that are no texts", where=where)
            return {key: self._given(part, (*way, key), f"{what}[{key!r}]") for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [self._given(part, (*way, place), f"{what}[{place}]") for place, part in enumerate(value)]
            return parts if isinstance(value, list) else tuple(parts)
        if (number := scalar(value)) is not None:
            return number
        if not hasattr(value, "__array__") and (dtype := dtype_name(value)) in DTYPES:
            return DType(str(dtype))
        if isinstance(value, range) or (isinstance(value, slice) and _is_of_integers(value)):
            return value  # numbers of Python's, which JSON has
        if (type(value).__module__, type(value).__name__) == ("torch", "device"):
            return Device(str(value))
        if not hasattr(value, "untyped_storage") and not hasattr(value, "__array__"):
            takes = "tensors, arrays, numbers, texts, dtypes, devices, slices and ranges of integers"
            raise GraphError(f"{what} is a {type(value).__name__}: a call takes {takes}{self._hint()}", where=where)
        if requires_gradients(value):
            self.written.append((way, value))
        return Given(self._recording.constants.add(value, where))

    def _later(self, value: Any, way: tuple[int | str, ...], what: str) -> Given:
        """A value of this trace: zeros until the call begins."""
        node = self._recording.own_node(state_of(value), self._where)
        known = self._recording.session.shape_of(node)
        limit = self._recording.description.limits.max_value_bytes
        size = num_bytes(known.dtype, known.shape)
        if "float" not in known.dtype:
            raise GraphError(
                f"{what} is a value of this trace of dtype {known.dtype}: what a model does may follow from integers, "
                "so they are known before anything runs; give a tensor",
                where=self._where,
            )
        if size > limit:
            raise TooLargeError(f"{what} has {size} bytes; the limit is {limit}", where=self._where)
        self.written.append((way, value))
        zeros = RawTensor(dtype=known.dtype, shape=known.shape, data=memoryview(bytes(size)))
        return Given(self._recording.constants.take(zeros))


def _is_of_integers(value: slice) -> bool:
    return all(part is None or type(part) is int for part in (value.start, value.stop, value.step))
