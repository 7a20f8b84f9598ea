"""Where results lie while shards write them and after: a folder, or a place of objects.

    results/<id>.safetensors                      in the folder: its full size from the start, filled by the shards
    results/<id>/<attempt>/<offset>               as objects: extents, which the shards put there (`engine.extents`)
    results/<id>/<attempt>/header-<size>          ... and the header, last: with it the result is whole

Owns these names. Knows nothing of states: who reads a result has seen that its request is done.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from api.disk import allocate, sync
from api.objects import Objects, Piece
from cluster.requests import ResultPlace
from engine.extents import DIGITS, name_of
from polytrace.errors import CapacityError, NotFoundError
from scheduling.plan import RequestId

SMALL_BYTES = 64 << 10
Read: TypeAlias = Callable[[int, int], bytes]  # so many bytes, from an offset on; OSError when they are not there


class Results(Protocol):
    """Any thread. One process places and commits."""

    def place(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        """Makes room for a result, whatever there was of an earlier attempt. Raises CapacityError."""

    def reading(self, request: RequestId) -> contextlib.AbstractContextManager[Read]:
        """What shards have written so far. OSError when nothing is placed."""

    def commit(self, request: RequestId, header: bytes, size: int | None) -> bytes | None:
        """Makes the result whole and durable; `size`: of all, where it is shorter than it was placed.

        A small one is returned and not durable yet (`api.fresh`).
        """

    def settle(self) -> None:
        """Behind a burst of commits that returned nothing: their names are durable too."""

    def forget(self, request: RequestId) -> None:
        """The request has ended: what the process remembers of it."""

    def drop(self, request: RequestId) -> None:
        """Removes it, whole or not; nothing when there is nothing."""

    def take_over(self, request: RequestId, file: Path) -> None:
        """A whole result of another store becomes one of this."""


class FileResults:
    """In a folder, on this machine or one that all nodes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, request: RequestId) -> Path:
        return self._folder / f"{request}.safetensors"

    def place(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        path = self.path(request)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            allocate(fd, room + data_bytes)  # a full disk shows here, not in a shard's write
        except OSError as error:
            path.unlink(missing_ok=True)
            told = f"the service has no room for a result of {room + data_bytes} bytes: {error.strerror}"
            raise CapacityError(told) from error
        finally:
            os.close(fd)
        return ResultPlace(path=path, start=room)

    @contextlib.contextmanager
    def reading(self, request: RequestId) -> Iterator[Read]:
        fd = os.open(self.path(request), os.O_RDONLY)
        try:
            yield lambda start, size: os.pread(fd, size, start)
        finally:
            os.close(fd)

    def commit(self, request: RequestId, header: bytes, size: int | None) -> bytes | None:
        fd = os.open(self.path(request), os.O_RDWR)
        try:
            if os.pwrite(fd, header, 0) != len(header):
                raise OSError("short write")
            placed = os.fstat(fd).st_size
            if size is not None and size != placed:
                os.ftruncate(fd, size)
            whole = placed if size is None else size
            if whole <= SMALL_BYTES and len(content := os.pread(fd, whole, 0)) == whole:
                return content
            os.fsync(fd)  # the shards' writes too: they went into the same file
        finally:
            os.close(fd)
        return None

    def settle(self) -> None:
        sync(self._folder)

    def sync(self, request: RequestId) -> None:
        """Makes a result durable that `commit` returned, unless it has gone; `settle` follows."""
        with contextlib.suppress(FileNotFoundError):
            sync(self.path(request))

    def write(self, request: RequestId, content: bytes) -> None:
        """Writes a whole result again, unless it is there; `sync` follows."""
        with contextlib.suppress(FileNotFoundError):
            if self.path(request).read_bytes() == content:
                return
        with open(os.open(self.path(request), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)

    def forget(self, request: RequestId) -> None:
        pass

    def drop(self, request: RequestId) -> None:
        self.path(request).unlink(missing_ok=True)

    def take_over(self, request: RequestId, file: Path) -> None:
        shutil.copyfile(file, self.path(request))
        sync(self.path(request))


class ObjectResults:
    """As objects. Every attempt has names of its own, so what a lost shard still writes spoils nothing."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._placed: dict[RequestId, tuple[str, int]] = {}  # attempt and size, of those that have not ended

    def place(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        attempt = secrets.token_hex(4)
        self._placed[request] = (attempt, room + data_bytes)
        return ResultPlace(path=Path(os.devnull), start=room, url=self._objects.at(_folder(request, attempt)))

    @contextlib.contextmanager
    def reading(self, request: RequestId) -> Iterator[Read]:
        if request not in self._placed:
            raise FileNotFoundError(request)
        folder = _folder(request, self._placed[request][0])

        def read(start: int, size: int) -> bytes:  # what is told while it runs is small: one extent each
            return self._objects.read((f"{folder}/{name_of(start)}", 0, size))[0] if size else b""

        yield read

    def commit(self, request: RequestId, header: bytes, size: int | None) -> bytes | None:
        if request not in self._placed:
            raise FileNotFoundError(f"no result of {request} was placed")
        attempt, placed = self._placed[request]
        whole = placed if size is None else size
        self._objects.put(f"{_folder(request, attempt)}/header-{whole:0{DIGITS}d}", header)
        return None

    def settle(self) -> None:
        pass

    def forget(self, request: RequestId) -> None:
        self._placed.pop(request, None)

    def drop(self, request: RequestId) -> None:
        self._objects.remove(f"results/{request}")

    def take_over(self, request: RequestId, file: Path) -> None:
        """As one object: all of it is the header."""
        size = file.stat().st_size
        self._objects.put_file(f"{_folder(request, 'copied')}/header-{size:0{DIGITS}d}", file)

    def stored(self, request: RequestId) -> StoredResult:
        """A whole result. Raises NotFoundError when there is none."""
        sizes = self._objects.sizes(f"results/{request}")
        for name in sizes:
            if found := re.fullmatch(rf"(\w+)/header-(\d{{{DIGITS}}})", name):
                attempt, size = found[1], int(found[2])
                break
        else:
            raise NotFoundError(f"the result of {request} is gone")
        extents = [(0, sizes[name], name)]
        for name, num_bytes in sorted(sizes.items()):
            if re.fullmatch(rf"{attempt}/\d{{{DIGITS}}}", name):
                extents.append((int(name.rpartition("/")[2]), num_bytes, name))
        return StoredResult(self._objects, f"results/{request}", attempt, size, tuple(extents))


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result as objects, to be read in order and never whole."""

    objects: Objects
    folder: str
    attempt: str
    size: int  # bytes
    extents: tuple[tuple[int, int, str], ...]  # offset, bytes, name; by offset

    def chunk(self, start: int, end: int) -> bytes:
        """The bytes from an offset to another one, zeros where nothing lies. FileNotFoundError: some are gone."""
        parts: list[Piece | bytes] = []
        at = bisect.bisect_right(self.extents, start, key=lambda extent: extent[0]) - 1
        while start < end:
            offset, num_bytes, name = self.extents[at]
            following = self.extents[at + 1][0] if at + 1 < len(self.extents) else self.size
            if start < (stop := min(end, offset + num_bytes)):
                parts.append((f"{self.folder}/{name}", start - offset, stop - offset))
                start = stop
            if start < (stop := min(end, following)):
                parts.append(bytes(stop - start))
                start = stop
            at += 1
        pieces = [part for part in parts if not isinstance(part, bytes)]
        read = iter(self.objects.read(*pieces) if pieces else ())
        return b"".join(part if isinstance(part, bytes) else next(read) for part in parts)


def _folder(request: RequestId, attempt: str) -> str:
    return f"results/{request}/{attempt}"
