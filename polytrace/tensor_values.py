"""Recorded values where torch is importable: a subclass of torch.Tensor.

Every torch function called on a recorded value arrives in `__torch_function__` and is recorded when the op table has
it. The tensor itself is an empty placeholder; when the trace ends it becomes the plain result
(`torch.utils.swap_tensors`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from polytrace import autograd, hints
from polytrace.arguments import normalised
from polytrace.composed import composed
from polytrace.edits.open_shapes import OpenShape
from polytrace.errors import GraphError
from polytrace.grammar import unknown_op
from polytrace.in_place import DATA_IS_READ_ONLY
from polytrace.lines import user_line
from polytrace.literals import dtype_name
from polytrace.ops import BY_TORCH_NAME
from polytrace.step_values import OfSteps, Steps, refuse_as_one
from polytrace.storage import State, is_recorded
from polytrace.tensors import VALUE_DTYPES, RawTensor
from polytrace.torch_names import find, is_in_place
from polytrace.value_methods import install
from polytrace.values import (
    Recorded,
    data_of,
    record,
    record_in_place,
    refuse_client_change,
    shape_of,
)

Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class TensorValue(Recorded, Tensor):  # type: ignore[misc]
    """A recorded value that is a torch.Tensor to every library. Made by `tensor_value`."""

    _state: State
    __array_ufunc__ = None  # numpy leaves `array * value` to us
    __array_priority__ = 1000

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(args, kwargs)
        if kwargs.get("out") is not None:
            refuse_client_change("`out=`")
        return _unknown(func, args)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # what goes past torch's own functions (`torch.tensor(value)`) would get the empty placeholder
        refuse_client_change("torch")

    # torch's getters would ask the placeholder

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        shape = shape_of(self).shape
        return shape if isinstance(shape, OpenShape) else torch.Size(shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return TORCH_DTYPES[shape_of(self).dtype]

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return self.dim()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    @property
    def layout(self) -> torch.layout:  # type: ignore[override]
        return torch.strided

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return False

    # modules of torch ask these to choose among ways that all mean the same

    @property
    def is_nested(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_sparse(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_quantized(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return True

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **where: Any) -> Tensor:  # type: ignore[override]
        """A tensor of the user's own, of this dtype."""
        return torch.tensor(data, dtype=dtype or self.dtype)

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def T(self) -> Any:  # type: ignore[override]
        if self.dim() > 2:
            raise GraphError(".T is for matrices: write .mT or .transpose(a, b)", where=user_line())
        return record("t", (self,), {})

    @property
    def mT(self) -> Any:  # type: ignore[override]
        return record("transpose", (self, -2, -1), {})

    @property
    def H(self) -> Any:  # type: ignore[override]
        return record("adjoint", (self,), {})

    @property
    def mH(self) -> Any:  # type: ignore[override]
        return record("adjoint", (self,), {})

    @property
    def real(self) -> Any:  # type: ignore[override]
        return record("real", (self,), {}) if self.is_complex() else self

    @property
    def imag(self) -> Any:  # type: ignore[override]
        return record("imag", (self,), {})

    @property
    def data(self) -> Any:
        recording = self._state.recording
        return recording.session.wrap(recording.data(self._state))

    @data.setter
    def data(self, value: Any) -> None:
        raise GraphError(DATA_IS_READ_ONLY, where=user_line())

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A dtype or its name, or a tensor whose dtype is meant; devices mean nothing here."""
        args = tuple([TORCH_DTYPES.get(part, part) if isinstance(part, str) else part for part in args])
        wanted = [part for part in (*args, kwargs.get("dtype"), kwargs.get("other")) if _is_dtype_like(part)]
        return record("to", (self, wanted[0]), {}) if wanted else self

    type = to


_PLACEHOLDER = torch.empty(0)


def tensor_value(state: State) -> TensorValue:
    """The Python object for a value."""
    value = Tensor._make_subclass(TensorValue, _PLACEHOLDER)
    value._state = state
    return value


def is_grad_off() -> bool:
    """Whether what torch computes now has no gradients."""
    return not torch.is_grad_enabled()


def become(value: Any, result: Any) -> None:
    """The recorded value is the plain result from now on, for everyone who holds it."""
    torch.utils.swap_tensors(value, result)


class StepTensors(OfSteps, Tensor):  # type: ignore[misc]
    """A value that was recorded once for several steps, when its block has ended."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise refuse_as_one()


def become_steps(value: Any, steps: Steps) -> None:
    """The recorded value is a sequence from now on, for everyone who holds it."""
    value.__dict__.clear()
    value.__class__ = StepTensors
    value.__dict__["steps"] = steps


def another(result: Any) -> Any:
    """A second tensor of the same content: two values were the same one."""
    return result.clone()


def decode(raw: RawTensor) -> Tensor:
    """The bytes of a result as a tensor that shares them."""
    if not raw.data.nbytes:
        return torch.empty(raw.shape, dtype=TORCH_DTYPES[raw.dtype])
    data = bytearray(raw.data) if raw.data.readonly else raw.data
    return torch.frombuffer(data, dtype=TORCH_DTYPES[raw.dtype]).reshape(raw.shape)


TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in VALUE_DTYPES}


install(TensorValue, frozenset(vars(Recorded)) | frozenset(vars(TensorValue)))


# --- what each torch function is recorded as


def _recorder(op: str) -> Handler:
    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("out") is not None:
            refuse_client_change("`out=`")
        if kwargs.get("inplace"):
            plain, named = normalised(op, args, kwargs | {"inplace": False})
            return record_in_place(op, plain[0], plain[1:], named)
        plain, named = normalised(op, args, kwargs)
        return record(op, plain, named)

    return handle


def _in_place_recorder(op: str) -> Handler:
    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_recorded(args[0]):
            refuse_client_change("in-place code")
        plain, named = normalised(op, args, kwargs)
        return record_in_place(op, plain[0], plain[1:], named)

    return handle


def _looker(function: Callable[..., Any]) -> Handler:
    """Of a function that answers with Python's own values: it needs data now."""

    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def plain(part: Any) -> Any:
            return data_of(part, f"{function.__name__}()") if is_recorded(part) else part

        return function(*map(plain, args), **{key: plain(part) for key, part in kwargs.items()})

    return handle


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return record("getitem", args, {})


def _setitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not is_recorded(args[0]):
        refuse_client_change("`tensor[...] = value`")
    args[0].__setitem__(args[1], args[2])


def _to_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_recorded(args[0]):
        return TensorValue.to(*args, **kwargs)
    return record("to", args[:2], {})  # client_tensor.to(value)


def _l1_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's own function hands everything on but the weight: it is in that function's frame."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.nn.functional.l1_loss.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    weight = frame.f_locals.get("weight") if frame is not None else None
    return _recorder("l1_loss")(args, {"weight": weight, **kwargs})


def _feature_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("training", True):
        raise GraphError("dropout of whole features is not drawn here: call module.eval() first", where=user_line())
    return args[0]


def _caller(function: Callable[..., Any]) -> Handler:
    return lambda args, kwargs: function(*args, **kwargs)


def _is_dtype_like(part: Any) -> bool:
    return isinstance(part, (torch.dtype, Tensor)) or dtype_name(part) is not None


def _itself(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _handlers() -> dict[Any, Handler]:
    found: dict[Any, Handler] = {}
    for name, spec in BY_TORCH_NAME.items():
        function = find(name)
        if function is None:
            continue
        if is_in_place(name):
            found[function] = _in_place_recorder(spec.name)
            continue
        found.setdefault(function, _recorder(spec.name))
        room, _, method = name.partition(".")
        if room == "Tensor":
            bare = method.strip("_")
            changing = f"__i{bare}__" if method.startswith("__") else f"{method}_"
            if (in_place := getattr(Tensor, changing, None)) is not None:
                found.setdefault(in_place, _in_place_recorder(spec.name))
        elif (in_place := find(f"{name}_")) is not None:  # torch.relu_, functional.elu_
            found.setdefault(in_place, _in_place_recorder(spec.name))
    for name in ("fill_", "zero_", "copy_"):
        found[getattr(Tensor, name)] = _in_place_recorder(name.strip("_"))
    for name in ("cpu", "cuda", "pin_memory"):
        found[getattr(Tensor, name)] = _itself
    for function in _ANSWERS:
        found.setdefault(function, _looker(function))
    for name, spec in BY_TORCH_NAME.items():  # the kernels behind functions that torch wrote in Python
        kernel = getattr(torch._VF, name.removeprefix("torch."), None) if name.startswith("torch.") else None
        if kernel is not None:
            found.setdefault(kernel, _recorder(spec.name))
    for name in ("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"):
        found[getattr(torch.nn.functional, name)] = _feature_dropout
    for function, running in composed().items():
        found[function] = _caller(running)
    for name in ("is_floating_point", "is_complex", "numel"):
        found[getattr(torch, name)] = _caller(getattr(TensorValue, name))
    found |= {
        torch.autograd.grad: _caller(autograd.grad),
        torch.autograd.backward: _caller(autograd.backward),
        torch.nn.functional.l1_loss: _l1_loss,
        Tensor.__getitem__: _getitem,
        Tensor.__setitem__: _setitem,
        Tensor.to: _to_first,
        Tensor.type: _to_first,
        Tensor.requires_grad_: _caller(Recorded.requires_grad_),
        Tensor.retain_grad: _caller(Recorded.retain_grad),
        Tensor.backward: _caller(Recorded.backward),
    }
    return found


# functions that answer with Python's own values
_ANSWERS: tuple[Callable[..., Any], ...] = (
    *(torch.equal, torch.allclose, torch.is_nonzero),
    *(Tensor.equal, Tensor.allclose, Tensor.is_nonzero, Tensor.item, Tensor.tolist),
)

_HANDLERS: dict[Any, Handler] = _handlers()


def _unknown(func: Any, args: Sequence[Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        words = hints.of_value(name) or f"a recorded value does not know its .{name} before it ran"
        raise GraphError(words, where=user_line())
    if name.endswith("_") and not name.endswith("__") and args and not is_recorded(args[0]):
        refuse_client_change("in-place code")
    if (told := hints.of_value(name)) is not None:
        raise GraphError(told, where=user_line())
    raise unknown_op(name, user_line())
