"""Products with a vector or a few columns whose every row has the same bits however many rows there are.

A matrix library chooses how it adds by how many rows, columns and matrices it gets. So where one side is small (a
direction, some directions), a product is written as what works row by row: element-wise products, added up along a
row, or one after the other. That goes for a request that runs alone as well: a table of many requests' rows
(`engine.row_tables`) has the bits of each. Half precision is rounded once, behind the sum.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

# U = members, C = what is summed, O = columns of the result

_MAX_ELEMENTS = 1 << 14  # of the small side
_MAX_COLUMNS = 16
_MAX_SUM = 1 << 15  # longer sums are cut over threads when there is one row only
_CHUNK = 1 << 20  # elements on the way
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def is_small(left: torch.Size | tuple[int, ...], right: torch.Size | tuple[int, ...]) -> bool:
    """Whether a product of these shapes, `[..., C]` by `[C]` or `[C, O]`, is worked out row by row."""
    if len(left) < 2 or len(right) not in (1, 2) or left[-1] != right[0] or 0 in left or 0 in right:
        return False
    summed, columns = right[0], right[1] if len(right) == 2 else 1
    return summed * columns <= _MAX_ELEMENTS and min(summed, columns) <= _MAX_COLUMNS and summed < _MAX_SUM


def by_rows(left: Tensor, right: Tensor) -> Tensor:
    """`left[u] @ right[u]` for each member: `[U, ..., C]` by `[U, C]` or `[U, C, O]`."""
    wide = torch.float32 if left.dtype in (torch.bfloat16, torch.float16) else left.dtype
    own, small = left.to(wide), right.to(wide)
    between = (1,) * (left.ndim - 2)
    if right.ndim == 2:
        return _summed(own, small.reshape(right.shape[0], *between, -1)).to(left.dtype)
    num, summed, columns = right.shape
    if summed < columns:  # few are added: one after the other
        total = own[..., 0:1] * small[:, 0].reshape(num, *between, columns)
        for place in range(1, summed):
            total = total + own[..., place : place + 1] * small[:, place].reshape(num, *between, columns)
        return total.to(left.dtype)
    turned = small.transpose(1, 2)
    if left.numel() * columns <= _CHUNK:
        whole = _summed(own[..., None, :], turned.reshape(num, *between, columns, summed))
    else:
        parts = [_summed(own, turned[:, place].reshape(num, *between, summed)) for place in range(columns)]
        whole = torch.stack(parts, -1)
    return whole.to(left.dtype)


def _summed(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).contiguous().sum(-1)


def product(left: Tensor, right: Tensor) -> Tensor | None:
    """`left @ right` row by row, None where it is not small, or not a product of numbers on a CPU."""
    is_ours = left.device.type == right.device.type == "cpu" and left.dtype is right.dtype and left.dtype in _DTYPES
    if not is_ours or not is_small(left.shape, right.shape):
        return None
    return by_rows(left[None], right[None])[0]


def turned(equation: object, left: int, right: int) -> bool | None:
    """Of an einsum of two, of so many dimensions: whether it is `left @ right.T` (True) or `left @ right` (False); None
    where it is neither.
    """
    terms = _EQUATION.fullmatch(equation.replace(" ", "")) if isinstance(equation, str) else None
    if terms is None:
        return None
    dots, own, other, dots_behind, result = terms.groups()
    rows, summed = own[:-1], own[-1:]
    names = set(own + other)
    is_plain = dots == dots_behind and len(names) == len(own + other) - 1 and summed in other and bool(summed)
    fits = len(other) == right and (dots is not None or len(own) == left)
    if not is_plain or not fits or result != rows + other.replace(summed, ""):
        return None
    return len(other) == 2 and other[1] == summed


_EQUATION = re.compile(r"(\.\.\.)?([a-zA-Z]*),([a-zA-Z]{1,2})->(\.\.\.)?([a-zA-Z]*)")


def by_equation(equation: object, left: Tensor, right: Tensor) -> Tensor | None:
    """An einsum of two as `product`."""
    is_turned = turned(equation, left.ndim, right.ndim)
    return None if is_turned is None else product(left, right.T if is_turned else right)
