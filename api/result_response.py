"""A result that lies among objects, as an HTTP answer: read in order, a chunk ahead of what is sent, never whole.

Ranges, If-Range, ETag and HEAD are those of RFC 9110; of several ranges at once the whole result is sent, as it allows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.results import StoredResult
from api.sending import chunk_bytes

CHUNK_BYTES = 4 << 20


class StoredResultResponse(Response):
    """Sends a stored result, or the range of it that was asked for."""

    def __init__(self, result: StoredResult, media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(media_type=media_type, headers=dict(headers))
        self._result = result
        self._chunk_bytes = CHUNK_BYTES
        del self.headers["content-length"]
        self.headers["accept-ranges"] = "bytes"
        self.headers["etag"] = f'"{result.attempt}-{result.size}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        start, end = 0, self._result.size
        wanted = asked.get("range") if asked.get("if-range", self.headers["etag"]) == self.headers["etag"] else None
        if wanted is not None and (found := _range(wanted, end)) is not None:
            start, end = found
            if start >= end:
                self.status_code = 416
                self.headers["content-range"] = f"bytes */{self._result.size}"
                start = end = 0
            else:
                self.status_code = 206
                self.headers["content-range"] = f"bytes {start}-{end - 1}/{self._result.size}"
        self.headers["content-length"] = str(end - start)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] != "HEAD" and start < end:
            with chunk_bytes(CHUNK_BYTES) as self._chunk_bytes:
                await self._send(start, end, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, start: int, end: int, send: Send) -> None:
        following = asyncio.ensure_future(self._chunk(start, end))
        try:
            while start < end:
                chunk = await following
                if len(chunk) != min(end - start, self._chunk_bytes):
                    raise OSError("a result is shorter than it was")
                start += len(chunk)
                if start < end:
                    following = asyncio.ensure_future(self._chunk(start, end))
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            following.cancel()

    async def _chunk(self, start: int, end: int) -> bytes:
        return await to_thread.run_sync(self._result.chunk, start, min(end, start + self._chunk_bytes))


def _range(wanted: str, size: int) -> tuple[int, int] | None:
    """The one range that is asked for, empty when there is nothing; None for what may be ignored."""
    found = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})-(\d{0,18})\s*", wanted)
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    if found[2] and int(found[2]) < int(found[1]):
        return None
    return int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
