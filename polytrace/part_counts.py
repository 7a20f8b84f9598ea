"""How many values an op returns whose number follows from shapes: split, chunk, unbind, meshgrid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SIZES = ("split_size", "split_size_or_sections", "split_sizes", "chunks", "indices", "sections")
_OF_DIM = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


def num_parts(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Values that the call returns; `shape` is that of its first operand, where that is one value.

    Raises ValueError for arguments that say no number.
    """
    if name in ("meshgrid", "broadcast_tensors"):
        return len(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else len(args)
    rest = list(args[1:])
    size = next((kwargs[key] for key in _SIZES if key in kwargs), None)
    if name != "unbind" and size is None:
        size = rest.pop(0) if rest else None
    dim = kwargs.get("dim", rest[0] if rest else 0)
    if name in _OF_DIM:
        dim = 0 if name == "hsplit" and len(shape) == 1 else _OF_DIM[name]
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        raise ValueError(f"{name} has no dimension {dim!r} in a value of shape {list(shape)}")
    length = shape[dim]
    if name == "unbind":
        return length
    is_by_places = name == "tensor_split" or name in _OF_DIM
    if isinstance(size, (list, tuple)):
        return len(size) + is_by_places
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} needs a size or a number of parts, not {size!r}")
    if is_by_places:
        return size
    part = size if name == "split" else max(1, math.ceil(length / size))
    return max(1, math.ceil(length / part))
