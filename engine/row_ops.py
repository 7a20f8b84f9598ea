"""Ops on tables of rows: one call for what many members would each call on values of one shape.

A member's value of shape `S` is row `u` of a stack `[U, *S]`; operands of fewer dimensions get 1s behind U.
Only ops whose every element, or every sum along the last dimension, has the same bits however many rows there are:
arithmetic that is exact up to one rounding, comparisons, choices, casts, views, row-wise reductions and products
(`engine.row_products`). Where an op is not one of them, `compiled` gives None and its members run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from engine.ops import CALLABLES, TORCH_DTYPES
from engine.row_products import by_rows, is_small, turned
from polytrace.graph import DType

# U = members


@dataclass(frozen=True, slots=True)
class Slot:
    """An operand that is a value of the table."""

    number: int


class Layout(Enum):
    """How a stack lies in memory."""

    DENSE = "dense"  # row-major without holes
    VIEW = "view"


@dataclass(frozen=True, slots=True)
class Own:
    """A member's own value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = Layout.DENSE

    @property
    def rank(self) -> int:
        return len(self.shape)


Stacks = list[Any]  # by slot
Run = Callable[[Stacks], Tensor]
Compiled = tuple[Run, Layout]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def compiled(
    name: str, args: Args, kwargs: Kwargs, owns: Sequence[Own], result: Own, *, is_cpu: bool
) -> Compiled | None:
    """What makes an op's stack; None when it has no form for tables. Arguments are static but for their slots."""
    if name in _EXACT:
        return None if _is_cut_off(args, owns, result) else _element_wise(name, args, kwargs, owns)
    if name in _RESHAPED:
        return _reshaped(args, owns, result)
    if name == "getitem":
        return _taken(args, kwargs, owns)
    if name == "setitem":
        return _put(args, kwargs, owns, [args[1]] if len(args) == 3 else [])
    if name == "set_view":
        return _put(args, kwargs, owns, _indices(args[1]) if len(args) == 3 else [])
    if name in _SPREAD:
        return _spread(args, owns, result)
    if is_cpu and name in _ALONG:
        return _along(name, args, kwargs, owns)
    if is_cpu and name in ("matmul", "einsum"):
        return _product(name, args, kwargs, owns)
    return None


# --- element by element

_EXACT = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "rdiv", "neg", "positive", "abs", "sqrt", "square", "sign"),
        *("clamp", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "relu", "nan_to_num"),
        *("floor", "ceil", "trunc", "eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isinf", "isnan"),
        *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
        *("logical_and", "logical_or", "logical_xor", "logical_not", "where", "where_method", "masked_fill"),
        *("to", "float", "double", "half", "bfloat16", "long", "int", "bool", "type_as"),
        *("clone", "contiguous", "detach", "zeros_like", "ones_like"),
    }
)
_KEYWORDS = frozenset({"min", "max", "other", "value", "nan", "posinf", "neginf", "dtype", "input"})


def _element_wise(name: str, args: Args, kwargs: Kwargs, owns: Sequence[Own]) -> Compiled | None:
    slots = [part for part in (*args, *kwargs.values()) if isinstance(part, Slot)]
    operands = [owns[slot.number] for slot in slots]
    if name == "masked_fill" and isinstance(args[-1], Slot):
        return None  # a number there stays one
    if not slots or not kwargs.keys() <= _KEYWORDS or any(isinstance(part, (tuple, list)) for part in args):
        return None
    if len({own.dtype for own in operands}) > 1 and any(own.rank == 0 for own in operands):
        return None  # a number of its own does not decide about the dtype of a result; in a stack it would
    rank = max(own.rank for own in operands)
    call = CALLABLES[name]
    is_dense = all(own.layout is Layout.DENSE for own in operands)
    layout = Layout.DENSE if is_dense else Layout.VIEW
    first, *others = args
    if not kwargs and isinstance(first, Slot) and len(others) == 1:
        left, right = _taking(first, rank, owns), _taking(others[0], rank, owns)
        return lambda stacks: call(left(stacks), right(stacks)), layout
    taking = [_taking(part, rank, owns) for part in args]
    named = {key: _taking(part, rank, owns) for key, part in kwargs.items()}

    def run(stacks: Stacks) -> Tensor:
        made: Tensor = call(*[take(stacks) for take in taking], **{key: take(stacks) for key, take in named.items()})
        return made

    return run, layout


def _is_cut_off(args: Args, owns: Sequence[Own], result: Own) -> bool:
    """Whether floating numbers become whole ones: what is too large for these is anything."""
    is_whole = not result.dtype.is_floating_point and result.dtype is not torch.bool
    return is_whole and any(owns[part.number].dtype.is_floating_point for part in args if isinstance(part, Slot))


def _taking(operand: Any, rank: int, owns: Sequence[Own]) -> Callable[[Stacks], Any]:
    """How an operand is had: a stack with so many dimensions behind U."""
    if not isinstance(operand, Slot):
        static = TORCH_DTYPES[operand.name] if isinstance(operand, DType) else operand
        return lambda _: static
    number, missing = operand.number, rank - owns[operand.number].rank
    if missing <= 0:
        return lambda stacks: stacks[number]
    index = (slice(None), *(None,) * missing)
    return lambda stacks: stacks[number][index]


# --- views and parts

_RESHAPED = frozenset({"unsqueeze", "squeeze", "reshape", "view", "flatten", "unflatten", "ravel"})
_SPREAD = frozenset({"expand", "expand_as", "broadcast_to"})


def _reshaped(args: Args, owns: Sequence[Own], result: Own) -> Compiled | None:
    first = args[0]
    if not isinstance(first, Slot) or owns[first.number].layout is not Layout.DENSE:
        return None
    number, shape = first.number, result.shape
    return lambda stacks: stacks[number].view(-1, *shape), Layout.DENSE


def _spread(args: Args, owns: Sequence[Own], result: Own) -> Compiled | None:
    first = args[0]
    if not isinstance(first, Slot):
        return None
    take, shape = _taking(first, result.rank, owns), result.shape
    return lambda stacks: take(stacks).expand(-1, *shape), Layout.VIEW


def _taken(args: Args, kwargs: Kwargs, owns: Sequence[Own]) -> Compiled | None:
    if len(args) != 2 or kwargs or not isinstance(args[0], Slot):
        return None
    own, number = owns[args[0].number], args[0].number
    index = _behind_members(args[1])
    if index is None:
        return None
    torch.empty(()).expand(1, *own.shape)[index]  # a list out of range raises here, not on a GPU
    example = torch.empty((2, *own.shape), device="meta")[index]
    is_dense = own.layout is Layout.DENSE and example.is_contiguous()
    return lambda stacks: stacks[number][index], Layout.DENSE if is_dense else Layout.VIEW


def _behind_members(index: Any) -> tuple[Any, ...] | None:
    """An index on a stack; None when it is not one of whole numbers, slices and at most one list."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list)]
    if len(lists) > 1 or any(type(place) is not int for part in lists for place in part):
        return None
    if lists and any(type(part) is int for part in parts):
        return None  # torch would put the list's dimension first
    is_plain = all(part is None or part is Ellipsis or type(part) in (int, slice, list) for part in parts)
    bounds = [bound for part in parts if isinstance(part, slice) for bound in (part.start, part.stop, part.step)]
    if not is_plain or any(bound is not None and type(bound) is not int for bound in bounds):
        return None
    return (slice(None), *parts)


def _indices(steps: Any) -> list[Any]:
    """The indices of a way into a value that consists of these alone; none otherwise."""
    found = []
    for step in steps if isinstance(steps, tuple) else ():
        name, own, named = step
        if name != "getitem" or named or len(own) != 1 or isinstance(own[0], list):
            return []
        found.append(own[0])
    return found


def _put(args: Args, kwargs: Kwargs, owns: Sequence[Own], indices: list[Any]) -> Compiled | None:
    base, value = args[0], args[-1]
    ways = [_behind_members(index) for index in indices]
    if kwargs or not isinstance(base, Slot) or not ways or owns[base.number].layout is not Layout.DENSE:
        return None
    if not (isinstance(value, Slot) or type(value) in (int, float, bool)):
        return None
    own = owns[base.number]
    part: Tensor = torch.empty((1, *own.shape), device="meta")
    steps: list[tuple[Any, ...]] = []
    for way in ways:
        if way is None:
            return None
        torch.empty(()).expand(part.shape)[way]  # a list out of range raises here, not on a GPU
        steps.append(way)
        part = part[way]
    target, *within = steps
    taking = _fitted(value, tuple(part.shape[1:]), owns)
    if taking is None or (within and any(isinstance(each, list) for step in steps for each in step)):
        return None
    number, shape, dtype = base.number, own.shape, own.dtype
    is_all = part.numel() == torch.Size(own.shape).numel() and isinstance(value, Slot)
    if is_all and not any(isinstance(each, list) for step in steps for each in step):
        inner = tuple(part.shape[1:])
        return lambda stacks: taking(stacks).to(dtype).expand(-1, *inner).reshape(-1, *shape), Layout.DENSE

    def run(stacks: Stacks) -> Tensor:
        changed: Tensor = stacks[number].clone()
        found = taking(stacks)
        given = found.to(dtype) if isinstance(found, Tensor) else found
        if within:
            view = changed[target]
            for step in within:
                view = view[step]
            view[...] = given
        else:
            changed[target] = given
        return changed

    return run, Layout.DENSE


def _fitted(value: Any, shape: tuple[int, ...], owns: Sequence[Own]) -> Callable[[Stacks], Any] | None:
    """How what is put into a part of this shape is had; None when it does not fit."""
    if not isinstance(value, Slot):
        return lambda _: value
    own = owns[value.number]
    surplus = own.rank - len(shape)
    if surplus <= 0:
        return _taking(value, len(shape), owns)
    if own.layout is not Layout.DENSE or any(size != 1 for size in own.shape[:surplus]):
        return None
    number, rest = value.number, own.shape[surplus:]
    return lambda stacks: stacks[number].view(-1, *rest)


# --- along the last dimension

_ALONG = frozenset({"sum", "mean", "amax", "amin", "norm", "softmax"})
_FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_LONGEST = 1 << 15  # longer rows are cut over threads where there is one only


def _along(name: str, args: Args, kwargs: Kwargs, owns: Sequence[Own]) -> Compiled | None:
    first, *given = args
    if not isinstance(first, Slot) or not kwargs.keys() <= {"dim", "keepdim", "p"}:
        return None
    own = owns[first.number]
    names = ["p", "dim", "keepdim"] if name == "norm" else ["dim", "keepdim"]
    if len(given) > len(names):
        return None
    bound = {**dict(zip(names, given, strict=False)), **kwargs}
    dim = bound.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if type(dim) is not int or own.rank == 0 or dim not in (-1, own.rank - 1):
        return None
    if own.dtype not in _FLOATING or own.layout is not Layout.DENSE or own.shape[-1] >= _LONGEST or 0 in own.shape:
        return None
    if type(bound.get("keepdim", False)) is not bool or bound.get("p", 2) not in (2, 2.0):
        return None
    named = {**bound, "dim": -1}
    call, number = CALLABLES[name], first.number
    return lambda stacks: call(stacks[number], **named), Layout.DENSE


def _product(name: str, args: Args, kwargs: Kwargs, owns: Sequence[Own]) -> Compiled | None:
    is_turned: bool | None = False
    operands = args
    if name == "einsum":
        equation, *rest = args
        operands = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)
        is_slot = len(operands) == 2 and all(isinstance(part, Slot) for part in operands)
        is_turned = turned(equation, *(owns[part.number].rank for part in operands)) if is_slot else None
    if kwargs or is_turned is None or len(operands) != 2 or not all(isinstance(part, Slot) for part in operands):
        return None
    left, right = (part.number for part in operands)
    ours, theirs = owns[left], owns[right]
    shape = theirs.shape[::-1] if is_turned else theirs.shape
    if ours.dtype is not theirs.dtype or ours.dtype not in _FLOATING or not is_small(ours.shape, shape):
        return None
    if is_turned:
        return lambda stacks: by_rows(stacks[left], stacks[right].transpose(1, 2)), Layout.DENSE
    return lambda stacks: by_rows(stacks[left], stacks[right]), Layout.DENSE
