"""Whether the values of index tensors are in range, for devices whose kernels do not say so.

A CPU kernel raises; a GPU kernel trips an assertion that ends every request of the process. So indices on a GPU are
looked at before they are used, which waits for the device once an op. Other devices need none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_index(base: Tensor, index: Any) -> None:
    """Ranges of the integer tensors in an index; torch checks all else itself. Raises IndexError."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, Tensor) and part.dtype is not torch.bool for part in parts):
        return
    taken = sum(_dims_taken(part) for part in parts)
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += base.dim() - taken
            continue
        if isinstance(part, Tensor) and part.dtype is not torch.bool and dim < base.dim():
            check_range(part, base.shape[dim], is_signed=True)
        dim += _dims_taken(part)


def _dims_taken(part: Any) -> int:
    """How many dimensions of the base one part of an index stands for; an Ellipsis counts 0."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype is torch.bool else 1


def check_along(input: Tensor, dim: int, index: Tensor) -> None:
    """The range of an index along one dimension, without signs. Raises IndexError."""
    check_range(index, input.shape[dim] if input.dim() else 1, is_signed=False)


def check_range(index: Tensor, size: int | None, *, is_signed: bool) -> None:
    """0 (or `-size`) to `size - 1`; None for no upper bound. Raises IndexError."""
    if not index.numel() or index.is_floating_point():
        return  # an index that is no integer is refused by the op
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(index)).tolist())
    lowest = -size if is_signed and size is not None else 0
    if low < lowest or (size is not None and high >= size):
        wrong = low if low < lowest else high
        raise IndexError(f"index {wrong} is out of bounds for a dimension with size {size}")
