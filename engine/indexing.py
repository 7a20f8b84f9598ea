"""Indices over shapes: what an index takes and leaves, and what it needs to know of values.

`normalise` turns the index of a `getitem` or `setitem` into parts that need no data: a boolean mask becomes the
integer indices it stands for, a 0-dim index a number, so that the meta device can do the rest. Ranges of known integer
indices are checked here, because the meta device does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.meta import Meta, contiguous
from polytrace.graph import NodeId, Ref

Data = Callable[[NodeId], Tensor | None]

_MASKS = (torch.bool, torch.uint8)


class DependsOnValues(Exception):
    """A shape depends on values that are not known before the run."""


def normalise(base: Meta, index: Any, metas: list[Any], data: Data, *, unknown_count: int | None = None) -> Any:
    """The index with Meta, numbers, slices, None and Ellipsis as parts only. Raises DependsOnValues, IndexError.

    `unknown_count` stands for the number of True in masks that are not known (assignment does not depend on it).
    """
    parts = [_literal(part) for part in (index if isinstance(index, tuple) else (index,))]
    taken = sum(_dims_taken(part, metas) for part in parts)
    if taken > len(base.shape):
        raise IndexError(f"too many indices: {taken} for a value of {len(base.shape)} dimensions")
    dim = 0
    found: list[Any] = []
    for part in parts:
        if part is Ellipsis:
            dim += len(base.shape) - taken
            found.append(part)
            continue
        found.extend(_normalise_part(part, base.shape[dim:], dim, metas, data, unknown_count))
        dim += _dims_taken(part, metas)
    return tuple(found)


def places(base_dims: int, index: Any) -> list[tuple[int, Any] | None]:
    """For each dimension of the result, the base's dimension it comes from and its part, None for a new one.

    `index` is normalised. Ints take their dimension away first, as in torch; dimensions of index tensors count as new.
    """
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for part in parts if part is not None and part is not Ellipsis)
    dim = 0
    kept: list[tuple[int, Any] | str | None] = []
    broadcast = 0
    for part in parts:
        if part is None:
            kept.append(None)
        elif part is Ellipsis:
            kept.extend((dim + offset, slice(None)) for offset in range(base_dims - taken))
            dim += base_dims - taken
        elif isinstance(part, Meta):
            kept.append("tensor")
            broadcast = max(broadcast, len(part.shape))
            dim += 1
        else:
            if isinstance(part, slice):
                kept.append((dim, part))
            dim += 1
    kept.extend((rest, slice(None)) for rest in range(dim, base_dims))
    tensors = [place for place, entry in enumerate(kept) if entry == "tensor"]
    rest = [entry for entry in kept if not isinstance(entry, str)]
    if not tensors:
        return rest
    is_adjacent = tensors[-1] - tensors[0] + 1 == len(tensors)
    first = tensors[0] if is_adjacent else 0
    return [*rest[:first], *[None] * broadcast, *rest[first:]]


def _normalise_part(
    part: Any, sizes: tuple[int, ...], dim: int, metas: list[Any], data: Data, unknown_count: int | None
) -> list[Any]:
    known: Tensor | None = None
    meta: Meta
    if isinstance(part, Ref):
        meta, known = metas[part.node], None
        if meta.dtype in _MASKS or not meta.shape or meta.dtype in (torch.int64, torch.int32):
            known = data(part.node)
    elif isinstance(part, list):
        known = torch.tensor(part, dtype=None if part else torch.int64)
        meta = contiguous(tuple(known.shape), known.dtype)
    elif isinstance(part, slice):
        return [slice(*[_bound(bound, data) for bound in (part.start, part.stop, part.step)])]
    else:
        return [part]
    if meta.dtype in _MASKS:
        return _mask_indices(meta, known, sizes, dim, unknown_count)
    if known is not None and known.numel() and not known.is_floating_point() and sizes:
        low, high = int(known.min()), int(known.max())
        if low < -sizes[0] or high >= sizes[0]:
            wrong = low if low < -sizes[0] else high
            raise IndexError(f"index {wrong} is out of bounds for dimension {dim} with size {sizes[0]}")
    if not meta.shape and not meta.dtype.is_floating_point:
        return [int(known) if known is not None else 0]  # a number at run time: the shape is that of any number
    return [meta]


def _mask_indices(
    meta: Meta, known: Tensor | None, sizes: tuple[int, ...], dim: int, unknown_count: int | None
) -> list[Any]:
    if meta.shape != sizes[: len(meta.shape)]:
        raise IndexError(
            f"a mask of shape {list(meta.shape)} does not fit dimensions {list(sizes[: len(meta.shape)])} "
            f"from dimension {dim} on"
        )
    if known is None and unknown_count is None:
        raise DependsOnValues
    count = int(known.count_nonzero()) if known is not None else unknown_count
    assert count is not None
    if not meta.shape:
        raise DependsOnValues  # a 0-dim mask adds a dimension; not worth a rule
    return [contiguous((count,), torch.int64)] * len(meta.shape)


def _bound(bound: Any, data: Data) -> Any:
    if not isinstance(bound, Ref):
        return bound
    known = data(bound.node)
    if known is None:
        raise DependsOnValues
    return int(known)


def _dims_taken(part: Any, metas: list[Any]) -> int:
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, Ref) and isinstance(metas[part.node], Meta) and metas[part.node].dtype in _MASKS:
        return len(metas[part.node].shape)
    if isinstance(part, list):
        literal = torch.tensor(part)
        return literal.dim() if literal.dtype is torch.bool else 1
    return 1


def _literal(part: Any) -> Any:
    """The part, a sequence in it as a list of numbers. torch has several meanings for anything else there."""
    if isinstance(part, bool):
        raise TypeError("True and False are not indices here: use None for a new dimension")
    if isinstance(part, (list, tuple)):
        return [_numbers(member) for member in part]
    return part


def _numbers(part: Any) -> Any:
    if isinstance(part, (list, tuple)):
        return [_numbers(member) for member in part]
    if not isinstance(part, int):
        raise TypeError("a list in an index holds numbers: use torch.stack for values")
    return part
