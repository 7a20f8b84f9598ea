"""How a model runs whose calls may be merged: what becomes of one call does not depend on how many are beside it.

Libraries choose how they add by the size of what they get. So linear layers get no fewer rows than make the common
path (`MIN_ROWS`, with zeros), and what works on one member of a batch at a time (convolutions, group norms) gets one at
a time; so do functions of single elements that treat the last few of what they get in another way. A call that has
nobody beside it runs the same way, which costs it next to nothing; whether that suffices for a model is tried by
`engine.whole_merging`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from scheduling.plan import MIN_ROWS

_BATCHED: dict[Any, int] = {  # functions that get one member at a time -> dimensions of what they get as a batch
    functional.conv1d: 3,
    functional.conv2d: 4,
    functional.conv3d: 5,
    functional.conv_transpose1d: 3,
    functional.conv_transpose2d: 4,
    functional.conv_transpose3d: 5,
}
_NORMS = frozenset({functional.group_norm, torch.group_norm})
_POINTWISE = frozenset(
    {
        *(torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, torch.exp, torch.exp_, Tensor.exp, Tensor.exp_),
        *(torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, functional.logsigmoid, functional.softplus),
        *(functional.silu, functional.gelu, functional.mish, functional.elu, functional.selu, functional.celu),
        *(torch.pow, Tensor.pow, Tensor.pow_, Tensor.__pow__, Tensor.__rpow__),
        *(torch.exp2, Tensor.exp2, torch.sinh, Tensor.sinh, torch.cosh, Tensor.cosh, torch.atanh, Tensor.atanh),
        *(torch.special.expit, torch.rsqrt, Tensor.rsqrt),
    }
)
_LANES = 64  # elements that a processor takes at once, at most: what is left over goes another way


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Every call of a model is inside. Torch does not take several operations of `nn.TransformerEncoder` in one there,
    which it does or not by who looks, and by whether gradients are asked for: with other numbers where a mask pads.
    What other threads run meanwhile goes as it would, and what somebody sets meanwhile stays.
    """
    token = _is_inside.set(True)
    try:
        with _slow_path:
            yield
    finally:
        _is_inside.reset(token)


@contextmanager
def operation_by_operation() -> Iterator[None]:
    """Inside torch goes no other ways for a batch of one, either."""
    with layer_by_layer(), _OneLayout():
        yield


_is_inside: ContextVar[bool] = ContextVar("layer_by_layer", default=False)


class _FastPath(int):
    """Torch's switch of its fast path while there are calls: off inside of them, and as it was for everybody else."""

    def __bool__(self) -> bool:
        return int(self) != 0 and not _is_inside.get()


class _SlowPath:
    """A context without the fast path, whose switch is the process's; contexts of several threads overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            usual: object = torch.backends.mha.get_fastpath_enabled()
            if not isinstance(usual, _FastPath):
                torch.backends.mha.set_fastpath_enabled(cast("bool", _FastPath(bool(usual))))

    def __exit__(self, *_raised: object) -> None:
        with self._lock:
            self._depth -= 1
            usual: object = torch.backends.mha.get_fastpath_enabled()
            if not self._depth and isinstance(usual, _FastPath):  # nobody has set another since
                torch.backends.mha.set_fastpath_enabled(int(usual) != 0)


_slow_path = _SlowPath()


class _OneLayout(TorchFunctionMode):
    """Linear layers get their rows in one layout: of a batch of one a library may not see that they lie otherwise."""

    def __torch_function__(
        self,
        function: Any,
        _types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is functional.linear and args and isinstance(args[0], Tensor):
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


@contextmanager
def call_by_call() -> Iterator[None]:
    """The model's code runs inside."""
    with operation_by_operation(), _CallByCall():
        yield


class _CallByCall(TorchFunctionMode):
    """Functions of torch, in this manner."""

    def __torch_function__(
        self,
        function: Any,
        _types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor):
            if function is functional.linear:
                return _linear(function, args, kwargs)
            if _goes_by_member(function, args, kwargs):
                # Also a single one, in one layout: a batch of one says nothing of how its members lie.
                members = args[0].split(1)
                made = torch.cat([function(member.contiguous(), *args[1:], **kwargs) for member in members])
                return args[0].copy_(made) if _is_in_place(function, kwargs) else made
        return function(*args, **kwargs)


def _is_in_place(function: Any, kwargs: Mapping[str, Any]) -> bool:
    name: str = function.__name__
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def _goes_by_member(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    tensor: Tensor = args[0]
    if tensor.ndim < 2 or not len(tensor):
        return False
    if function in _POINTWISE:
        is_by_numbers = not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))  # nor has `out`
        return is_by_numbers and math.prod(tensor.shape[1:]) % _LANES != 0
    return function in _NORMS or _BATCHED.get(function) == tensor.ndim


def _linear(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    rows = args[0].shape[:-1]
    num_rows = math.prod(rows)
    if not 0 < num_rows < MIN_ROWS:
        return function(*args, **kwargs)
    flat = args[0].reshape(num_rows, -1)
    padded = torch.cat([flat, flat.new_zeros(MIN_ROWS - num_rows, flat.shape[1])])
    out = function(padded, *args[1:], **kwargs)[:num_rows]
    return out.reshape(*rows, out.shape[-1])
