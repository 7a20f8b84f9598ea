"""Receiving a request into its file, as it arrives, under a hard limit."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import BinaryIO, TypeVar

from starlette.requests import Request

from api.hops import hop
from api.upload_room import PART_BYTES, Room
from polytrace.errors import CapacityError, TooLargeError, WireError

T = TypeVar("T")
SLOWEST = 1024  # bytes a second, once a call has had GRACE silences
GRACE = 4.0


class Pace:
    """How a body comes: never silent for `idle_s`, and not slower than SLOWEST. Raises WireError."""

    def __init__(self, idle_s: float, what: str = "upload") -> None:
        self._idle_s = idle_s
        self._what = what
        self._began = time.monotonic()
        self.num_bytes = 0

    def came(self, num_bytes: int) -> int:
        """Some more; how many there are."""
        self.num_bytes += num_bytes
        return self.num_bytes

    async def next(self, part: Awaitable[T]) -> T:
        """The next part of it, in time."""
        left_s = self._began + GRACE * self._idle_s + self.num_bytes / SLOWEST - time.monotonic()
        try:
            return await asyncio.wait_for(part, min(self._idle_s, left_s))
        except TimeoutError:
            if left_s < self._idle_s:
                told = f"the {self._what} has brought {self.num_bytes} bytes in {time.monotonic() - self._began:.0f} s"
                raise WireError(f"{told}: slower than {SLOWEST} a second none is taken") from None
            told = f"the {self._what} fell silent for {self._idle_s:g} s after {self.num_bytes} bytes"
            raise WireError(told) from None


async def receive(
    request: Request,
    path: Path,
    *,
    max_bytes: int,
    idle_s: float,
    whose: str = "this deployment",
    room: Room | None = None,
) -> int:
    """Writes the call's body to a new file; how many bytes. Never holds more than about 1 MiB of it in memory.

    Raises TooLargeError beyond `max_bytes`, the limit of `whose`: at once when the call announces it, else when it
    happens. Raises what `Room.hold` does, WireError when the sender falls silent for `idle_s` or stays slower than
    SLOWEST, CapacityError when the disk is full, starlette's ClientDisconnect when it leaves. What was written stays,
    and so does the room that it takes: the caller discards and releases it.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(f"has {int(announced)} bytes", max_bytes, whose)
    pace = Pace(idle_s)
    if room is not None and announced.isdecimal():
        room.hold(int(announced))
    parts: list[bytes] = []
    gathered = 0
    chunks = aiter(request.stream())
    file: BinaryIO | None = None
    try:
        while True:
            chunk = await pace.next(anext(chunks, None))
            if chunk:
                num_bytes = pace.came(len(chunk))
                if num_bytes > max_bytes:
                    raise _too_large(f"is longer than {max_bytes} bytes", max_bytes, whose)
                if room is not None:
                    room.hold(num_bytes)
                parts.append(chunk)
                gathered += len(chunk)
            if gathered >= (PART_BYTES if room is None else room.part_bytes) or chunk is None:
                file = await hop(_write, path, file, parts)
                parts, gathered = [], 0
            if chunk is None:
                return pace.num_bytes
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
