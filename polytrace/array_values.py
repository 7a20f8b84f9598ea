"""Recorded values where torch is not installed: plain objects with a tensor's methods, made from the op table.

When the trace ends the object holds a numpy array and does what the array does; `value.value` is the array itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from polytrace.graph import DType
from polytrace.literals import dtype_name
from polytrace.step_values import OfSteps, Steps, refuse_as_one
from polytrace.storage import State
from polytrace.tensors import DTYPES, RawTensor
from polytrace.value_methods import install
from polytrace.values import Recorded, record, record_in_place, shape_of


class _Held:
    """First base of both classes, so that Python lets an object of the one become one of the other."""

    __slots__ = ()


class ArrayValue(_Held, Recorded):
    """A recorded value; once saved and returned, what its numpy array is."""

    __array_ufunc__ = None  # numpy arrays leave `array * value` to us
    __array_priority__ = 1000

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self).shape

    @property
    def dtype(self) -> str:
        return shape_of(self).dtype

    @property
    def ndim(self) -> int:
        return self.dim()

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def T(self) -> Any:
        return record("t", (self,), {})

    @property
    def mT(self) -> Any:
        return record("transpose", (self, -2, -1), {})

    @property
    def mH(self) -> Any:
        return record("adjoint", (self,), {})

    @property
    def real(self) -> Any:
        return record("real", (self,), {})

    @property
    def imag(self) -> Any:
        return record("imag", (self,), {})

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        for wanted in (dtype, *args):
            if isinstance(wanted, ArrayValue) or dtype_name(wanted) is not None:
                return record("to", (self, wanted), {})
            if isinstance(wanted, str) and wanted in DTYPES:
                return record("to", (self, DType(wanted)), {})
        return self  # devices mean nothing here

    def cpu(self) -> Any:
        return self

    def zero_(self) -> Any:
        return record_in_place("zero", self, (), {})

    def fill_(self, value: Any) -> Any:
        return record_in_place("fill", self, (value,), {})

    def copy_(self, value: Any) -> Any:
        return record_in_place("copy", self, (value,), {})


class ReturnedValue(_Held):
    """A saved value after its trace: stands for the numpy array that it became."""

    __array_priority__ = 1000

    @property
    def value(self) -> Any:
        """The numpy array itself."""
        return self.__dict__["_array"]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.array(self.value, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*(plain(part) for part in inputs), **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value[plain(index)] = plain(value)

    def __repr__(self) -> str:
        return repr(self.value)

    def __hash__(self) -> int:
        return id(self)


def array_value(state: State) -> ArrayValue:
    """The Python object for a value."""
    value = ArrayValue()
    value.__dict__["_state"] = state
    return value


def become(value: Any, result: Any) -> None:
    """The recorded value stands for the array from now on, for everyone who holds it."""
    value.__dict__.clear()
    value.__class__ = ReturnedValue
    value.__dict__["_array"] = result


class StepArrays(_Held, OfSteps):
    """A value that was recorded once for several steps, when its block has ended."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise refuse_as_one()


def become_steps(value: Any, steps: Steps) -> None:
    """The recorded value stands for a sequence of arrays from now on, for everyone who holds it."""
    value.__dict__.clear()
    value.__class__ = StepArrays
    value.__dict__["steps"] = steps


def another(result: Any) -> Any:
    """A second array of the same content: two values were the same one."""
    return result.copy()


def decode(raw: RawTensor) -> Any:
    """The bytes of a result as a numpy array; bfloat16, which numpy lacks, widened to float32."""
    import numpy as np

    if raw.dtype == "bfloat16":
        return (np.frombuffer(raw.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(raw.shape)
    return np.frombuffer(raw.data, np.dtype(raw.dtype)).reshape(raw.shape)


def plain(value: Any) -> Any:
    """The array that a returned value stands for; anything else as it is."""
    return value.value if isinstance(value, ReturnedValue) else value


def _delegate(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: Any, *args: Any) -> Any:
        return function(self.value, *(plain(arg) for arg in args))

    return method


def _reflected(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        return function(plain(other), self.value)

    return method


def _install() -> None:
    """Gives a returned value its array's operators."""
    for binary in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"]:
        bare = binary.strip("_")
        setattr(ReturnedValue, f"__{bare}__", _delegate(binary))
        setattr(ReturnedValue, f"__r{bare}__", _reflected(binary))
    for one in ["eq", "ne", "lt", "le", "gt", "ge", "getitem", "neg", "abs", "invert", "index"]:
        setattr(ReturnedValue, f"__{one}__", _delegate(one))
    for converter in (bool, int, float, complex, len, iter):
        setattr(ReturnedValue, f"__{converter.__name__}__", _converted(converter))


def _converted(converter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: converter(self.value)


install(ArrayValue, frozenset(vars(Recorded)) | frozenset(vars(ArrayValue)))
_install()
