"""A tensor as bytes with a shape, so that the client and the wire need neither torch nor numpy.

Owns dtype names (torch's, without the prefix), their sizes and safetensors codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# name -> (bytes an element, code in a safetensors header)
DTYPES: dict[str, tuple[int, str]] = {
    "float64": (8, "F64"),
    "float32": (4, "F32"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "int64": (8, "I64"),
    "int32": (4, "I32"),
    "int16": (2, "I16"),
    "int8": (1, "I8"),
    "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}

# Complex values live between ops only: they come and go as real and imaginary parts.
VALUE_DTYPES: dict[str, int] = {**{name: size for name, (size, _) in DTYPES.items()}, "complex64": 8, "complex128": 16}

NAME_OF_CODE: dict[str, str] = {code: name for name, (_, code) in DTYPES.items()}


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return VALUE_DTYPES[dtype]


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * itemsize(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTensor:
    """Dense, row-major, little-endian. `data` is borrowed: the maker keeps it alive and unchanged.

    One that stands on the service has no data here, but a `digest` or a `state` that names it.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview  # format "B", `num_bytes(dtype, shape)` long
    digest: str | None = field(default=None, compare=False)  # of its content (`polytrace.contents`), where it is known
    state: str | None = None  # the named state whose content it is when the request begins

    @property
    def is_here(self) -> bool:
        """Whether the bytes are."""
        return len(self.data) == num_bytes(self.dtype, self.shape)
