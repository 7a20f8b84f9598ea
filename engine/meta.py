"""What an op makes of shapes: the op itself, run on torch's meta device, remembered by the shapes it was asked for.

Owns `Meta` (a tensor without data, as a hashable value) and the memory of results. torch's own rules decide shape,
dtype and whether operands fit; a meta op costs 0.03 to 1 ms, and a graph asks for few different ones, so each is run
once.
Knows no graph: operands arrive frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache, partial
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.ops import DTYPE_NAMES, TORCH_DTYPES, run_op
from engine.workspace import work_elements
from polytrace.graph import DType, Ref
from polytrace.shape_rules import RULES


class Meta(NamedTuple):
    """A tensor without data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the value when it is dense, whatever memory it shares."""
        return math.prod(self.shape) * self.dtype.itemsize


# An operand as a hashable value. Python says 1 == 1.0 == True, and torch does not: all but ints carry a tag.
Frozen: TypeAlias = Hashable


# What torch and models raise when operands do not fit. NotImplementedError and OverflowError are among them.
MISFITS = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError)


_META = torch.device("meta")
_MAX_REHEARSED = 1 << 14  # elements of an op's operands and results together
_NO_KERNEL = re.compile(r"not implemented for|not support|only support|same dtype")
_ONE_DTYPE = frozenset({"matmul", "rmatmul", "mm", "bmm", "dot", "linear"})  # the meta device does not always insist
_TAKES_SCALARS = frozenset({"full_like"})  # as operands that are tensors elsewhere
_KERNELS_OF_ONE_DTYPE = (functional.linear, functional.layer_norm, torch.matmul, torch.bmm, torch.addmm, torch.mm)
_HALF = re.compile(r"Half|BFloat16")


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Meta:
    """A dense, row-major one."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Meta(shape, tuple(reversed(strides)), dtype)


class OneDtype(TorchFunctionMode):
    """Within it, products and layer norms of tensors of several dtypes are refused, as on every device but meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KERNELS_OF_ONE_DTYPE:
            dtypes = {part.dtype for part in (*args, *kwargs.values()) if isinstance(part, Tensor)}
            is_half = args[0].dtype in (torch.float16, torch.bfloat16)
            if len(dtypes) > 1 and not (func is functional.layer_norm and is_half):  # its weights may be float32 then
                names = " and ".join(sorted(DTYPE_NAMES[dtype] for dtype in dtypes))
                raise TypeError(f"its value and the weights must have one dtype, not {names}")
        return func(*args, **kwargs)


def meta_of(value: Any) -> Meta | tuple[Meta, ...]:
    """What a tensor, or a tuple of tensors, looks like. Raises TypeError for anything else."""
    if isinstance(value, Tensor):
        return Meta(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (tuple, list)) and value and all(isinstance(member, Tensor) for member in value):
        return tuple([Meta(tuple(member.shape), member.stride(), member.dtype) for member in value])
    raise TypeError(f"the result is a {type(value).__name__}, not a tensor")


def tensor_of(meta: Meta) -> Tensor:
    """A tensor on the meta device: shape and dtype, no memory."""
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")


def freeze(operand: Any, values: Any) -> Frozen:
    """An operand with the Meta `values[node]` in the place of its references. An operand may hold Meta already."""
    kind = type(operand)
    if kind is Ref:
        value = values[operand.node]
        if type(value) is not Meta:
            raise TypeError("an operand has several values: take one of them first")
        return value
    if kind is int or operand is None or kind is EllipsisType or kind is Meta:
        frozen: Frozen = operand
        return frozen
    if kind is tuple or kind is list:
        return ("tuple" if kind is tuple else "list", *[freeze(part, values) for part in operand])
    if kind is slice:
        return ("slice", *[freeze(part, values) for part in (operand.start, operand.stop, operand.step)])
    if kind is DType:
        return TORCH_DTYPES[operand.name]
    return (kind.__name__, operand)  # bool, float, str


def thaw(frozen: Frozen, make: Callable[[Meta], Any] = tensor_of) -> Any:
    """The argument that `freeze` described, with tensors made by `make`."""
    if isinstance(frozen, Meta):
        return make(frozen)
    if not isinstance(frozen, tuple):
        return frozen
    tag = frozen[0]
    if tag == "tuple":
        return tuple([thaw(part, make) for part in frozen[1:]])
    if tag == "list":
        return [thaw(part, make) for part in frozen[1:]]
    if tag == "slice":
        return slice(*[thaw(part, make) for part in frozen[1:]])
    return frozen[1]


@lru_cache(maxsize=8192)
def result_of(name: str, args: tuple[Frozen, ...], kwargs: tuple[tuple[str, Frozen], ...]) -> Meta | tuple[Meta, ...]:
    """What the op returns for frozen operands. Raises what torch raises when they do not fit."""
    if name in _ONE_DTYPE:
        dtypes = {part.dtype for part in (*args, *[part for _, part in kwargs]) if isinstance(part, Meta)}
        if len(dtypes) > 1:
            raise TypeError(
                f"its operands must have one dtype, not {' and '.join(sorted(DTYPE_NAMES[d] for d in dtypes))}"
            )
    if name in _TAKES_SCALARS or (
        name == "clamp" and len({isinstance(part, Meta) for part in _bounds(args, kwargs)}) > 1
    ):
        args, kwargs = (args[0], *[_scalar(part) for part in args[1:]]), tuple([(k, _scalar(v)) for k, v in kwargs])
    thawed = tuple([thaw(argument) for argument in args])
    with torch.no_grad():
        run = RULES.get(name) or partial(_run_on_meta, name)
        value = meta_of(run(*thawed, **{key: thaw(argument) for key, argument in kwargs}))
        _rehearse(name, args, kwargs, value)
    return value


def work_of(name: str, args: tuple[Frozen, ...], kwargs: tuple[tuple[str, Frozen], ...]) -> int:
    """Elements that the op takes while it runs, beyond its operands and results."""
    shapes = list(_shapes((*args, *[part for _, part in kwargs])))
    return work_elements(name, shapes, thaw(args[0], lambda meta: meta) if args and name == "einsum" else None)


def _shapes(part: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(part, Meta):
        yield part.shape
    elif isinstance(part, tuple):
        for member in part:
            yield from _shapes(member)


def _run_on_meta(name: str, *args: Any, **kwargs: Any) -> Any:
    return run_op(name, args, kwargs, device=_META)


def _bounds(args: tuple[Frozen, ...], kwargs: tuple[tuple[str, Frozen], ...]) -> list[Frozen]:
    return [part for part in (*args[1:], *[part for _, part in kwargs]) if part is not None]


def _scalar(part: Frozen) -> Frozen:
    """A number in the place of a 0-dim tensor, which torch would ask for its value."""
    if not isinstance(part, Meta) or part.shape:
        return part
    return ("float", 1.0) if part.dtype.is_floating_point else ("bool", True) if part.dtype is torch.bool else 1


def _rehearse(
    name: str,
    args: tuple[Frozen, ...],
    kwargs: tuple[tuple[str, Frozen], ...],
    value: Meta | tuple[Meta, ...],
) -> None:
    """Runs a small op on zeros: the meta device knows neither every bound of `dim` nor which dtypes have a kernel."""
    size = _num_elements(args) + _num_elements(kwargs) + _num_elements(value) + work_of(name, args, kwargs)
    if size > _MAX_REHEARSED:
        return
    try:
        run_op(name, tuple([thaw(part, _zeros) for part in args]), {key: thaw(part, _zeros) for key, part in kwargs})
    except MISFITS as error:
        told = str(error)
        if told.startswith("Dimension out of range") or (_NO_KERNEL.search(told) and not _HALF.search(told)):
            raise
        # anything else comes of the zeros; half precision has more kernels on a GPU


def _zeros(meta: Meta) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype)


def _num_elements(part: Any) -> int:
    if isinstance(part, Meta):
        return math.prod(part.shape)
    return sum(_num_elements(member) for member in part) if isinstance(part, tuple) else 0
