"""torch's many ways to write an argument, brought to the one that the op table takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polytrace.graph import DType
from polytrace.ops import OPS

# Arguments that say where or how a result lies, not what it is.
_MEANINGLESS = frozenset(
    (
        "_stacklevel",
        "memory_format",
        "device",
        "non_blocking",
        "layout",
        "pin_memory",
        "copy",
        "requires_grad",
        "inplace",
        "out",
    )
)
# More results, or another kind of gradient, when they are True: False says what an op does anyway.
_OFF = frozenset(
    ("return_indices", "return_inverse", "return_counts", "as_tuple", "sparse", "sparse_grad", "scale_grad_by_freq")
)
_SYNONYMS = {"axis": "dim", "keepdims": "keepdim"}  # numpy's names, which torch takes too
_FIRST = ("input", "self", "tensor", "tensors")


def normalised(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments without what is None by default or means nothing to a recorded value."""
    plain = tuple(args)
    named: dict[str, Any] = {}
    for key, value in kwargs.items():
        key = _SYNONYMS.get(key, key)
        if value is None or key in _MEANINGLESS or (value is False and key in _OFF):
            continue
        if key in _FIRST and name in OPS and key not in OPS[name].kwargs:
            plain = (value, *plain)
        else:
            named[key] = DType(value) if key == "dtype" and isinstance(value, str) else value
    if not plain and name in OPS:
        first = next((key for key in OPS[name].first if key in named), None)
        plain = (named.pop(first),) if first is not None else ()
    return plain, named
