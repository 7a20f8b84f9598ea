"""Shapes of what torch's meta device cannot tell: rules by hand, on tensors without data, for clients and services."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _covariance(input: Tensor, **named: Any) -> Tensor:
    if input.dim() > 2:
        raise ValueError(f"it takes observations in columns of a matrix, not a value of {input.dim()} dimensions")
    size = (input.shape[0], input.shape[0]) if input.dim() == 2 else ()
    is_whole = not (input.is_floating_point() or input.is_complex())
    return torch.empty(size, dtype=torch.float32 if is_whole else input.dtype, device="meta")


def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> tuple[Tensor]:
    """`[..., m, n]` and `[..., m, k]` to `[..., n, k]`; a batch of vectors `[..., m]` is one where torch says so."""
    if A.dim() < 2 or not B.dim() or A.dtype is not B.dtype:
        raise ValueError("it takes a matrix and right-hand sides of one dtype")
    is_vector = B.dim() == A.dim() - 1 and B.shape == A.shape[:-1]
    columns = B.unsqueeze(-1) if is_vector else B
    if columns.dim() < 2 or columns.shape[-2] != A.shape[-2]:
        raise ValueError(f"the right-hand sides {list(B.shape)} have not as many rows as the matrix {list(A.shape)}")
    batch = torch.broadcast_shapes(A.shape[:-2], columns.shape[:-2])
    size = (*batch, A.shape[-1]) if is_vector else (*batch, A.shape[-1], columns.shape[-1])
    return (torch.empty(size, dtype=A.dtype, device="meta"),)


def _cond(predicate: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    return if_true


RULES: dict[str, Callable[..., Any]] = {"cov": _covariance, "corrcoef": _covariance, "lstsq": _lstsq}
CLIENT_RULES: dict[str, Callable[..., Any]] = {**RULES, "cond": _cond}  # what has no torch callable to ask
