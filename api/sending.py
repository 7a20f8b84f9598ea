"""Files as answers: as fast as one caller takes them, and little in memory however many take them slowly.

Ranges, ETag, If-Range and HEAD are starlette's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

MEMORY_BYTES = 16 << 20  # for what is read ahead of all callers
LEAST_BYTES = 64 << 10  # whose reads cost three times as much as long ones'
_under_way = 0


@contextmanager
def chunk_bytes(most: int = 1 << 20) -> Iterator[int]:
    """How much of an answer is to be read at once; while the block runs, it is one that is under way."""
    global _under_way
    _under_way += 1
    try:
        yield max(LEAST_BYTES, min(most, MEMORY_BYTES // _under_way))
    finally:
        _under_way -= 1


class StoredFile(FileResponse):
    """A file of the store."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with chunk_bytes() as size:
            self.chunk_size = size
            await super().__call__(scope, receive, send)
