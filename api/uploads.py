"""Receiving a request into its file, as it arrives, under a hard limit."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request

from api.hops import hop
from polytrace.errors import CapacityError, TooLargeError, WireError

SLOWEST = 1024  # bytes a second, once a call has had GRACE silences
GRACE = 4.0
_PART_BYTES = 1 << 20  # gathered before a write, which then leaves the event loop


async def receive(
    request: Request, path: Path, *, max_bytes: int, idle_s: float, whose: str = "this deployment"
) -> int:
    """Writes the call's body to a new file; how many bytes. Never holds more than about 1 MiB of it.

    Raises TooLargeError beyond `max_bytes`, the limit of `whose`: at once when the call announces it, else when it
    happens. Raises WireError when the sender falls silent for `idle_s` or stays slower than SLOWEST, CapacityError
    when the disk is full, starlette's ClientDisconnect when it leaves. What was written stays: the caller discards it.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(f"has {int(announced)} bytes", max_bytes, whose)
    began = time.monotonic()
    num_bytes = 0
    parts: list[bytes] = []
    gathered = 0
    chunks = aiter(request.stream())
    file: BinaryIO | None = None
    try:
        while True:
            left_s = began + GRACE * idle_s + num_bytes / SLOWEST - time.monotonic()
            try:
                chunk = await asyncio.wait_for(anext(chunks, None), min(idle_s, left_s))
            except TimeoutError:
                if left_s < idle_s:
                    told = f"the upload has brought {num_bytes} bytes in {time.monotonic() - began:.0f} s"
                    raise WireError(f"{told}: slower than {SLOWEST} a second none is taken") from None
                raise WireError(f"the upload fell silent for {idle_s:g} s after {num_bytes} bytes") from None
            if chunk:
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(f"is longer than {max_bytes} bytes", max_bytes, whose)
                parts.append(chunk)
                gathered += len(chunk)
            if gathered >= _PART_BYTES or chunk is None:
                file = await hop(_write, path, file, parts)
                parts, gathered = [], 0
            if chunk is None:
                return num_bytes
    finally:
        if file is not None:
            file.close()


def _write(path: Path, file: BinaryIO | None, parts: list[bytes]) -> BinaryIO:
    """Appends to the file, which the first call makes."""
    made: BinaryIO | None = None
    try:
        if file is None:
            file = made = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)  # noqa: SIM115
        view = memoryview(b"".join(parts))
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        if made is not None:
            made.close()
        raise CapacityError(f"the service has no room for the request: {error.strerror}") from error
    return file


def _too_large(what: str, max_bytes: int, whose: str) -> TooLargeError:
    return TooLargeError(
        f"the request {what}; {whose} {'takes' if 'deployment' in whose else 'may send'} at most {max_bytes}"
    )
