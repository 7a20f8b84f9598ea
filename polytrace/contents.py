"""The content of a tensor by its hash: what is large, or stands on the service already, is named instead of sent.

Owns what the hash is of and the rules for names. Knows nothing of who keeps contents.
A hash is over dtype, shape and the hashes of the bytes' parts, so that a large tensor is hashed by several cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from polytrace.errors import GraphError
from polytrace.tensors import RawTensor

LARGE_BYTES = 64 << 10  # a constant of so many bytes or more is uploaded once and named by its hash
_PART_BYTES = 8 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def digest_of(dtype: str, shape: Iterable[int], data: bytes | bytearray | memoryview) -> str:
    """64 hexadecimal digits that two tensors share only if dtype, shape and every byte are equal."""
    view = memoryview(data)
    parts = [view[start : start + _PART_BYTES] for start in range(0, len(view), _PART_BYTES)]
    if len(parts) > 1:
        with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
            hashes = list(pool.map(_hash, parts))
    else:
        hashes = [_hash(part) for part in parts]
    return hashlib.sha256(json.dumps([dtype, list(shape)]).encode() + b"".join(hashes)).hexdigest()


def identity(raw: RawTensor) -> str:
    """What constants share only if they are one content, or one state, whatever that holds by now."""
    return f"state {raw.state}" if raw.state is not None else raw.digest or digest_of(raw.dtype, raw.shape, raw.data)


def is_digest(value: object) -> bool:
    """Whether a value may be a hash; it is safe as a file's name then."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_name(value: object) -> bool:
    """Whether a value can name what is kept: letters, digits, '.', '_' and '-', at most 100."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def check_name(name: object, where: str | None = None) -> str:
    """The same. Raises GraphError when it cannot be a name."""
    if not isinstance(name, str) or not is_name(name):
        raise GraphError(f"{name!r} cannot be a name: letters, digits, '.', '_' and '-', at most 100", where=where)
    return name


def is_named(raw: RawTensor) -> bool:
    """Whether a constant of a request can be sent as its hash."""
    return raw.digest is not None and len(raw.data) >= LARGE_BYTES


def _hash(part: memoryview) -> bytes:
    return hashlib.sha256(part).digest()
