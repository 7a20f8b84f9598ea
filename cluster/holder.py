"""Files in the memory of a node, so that whoever reads them next reads no disk.

A file is mapped, read into the page cache, and locked there, where this process may lock so much: then nothing takes it
out while it is held. Else the kernel may, when others need the memory, and what is read says so. Linux only.

A plain class; `cluster.warmth` makes it remote on the nodes. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from polytrace.errors import CapacityError, ServiceError

MARGIN = 0.1  # of the free memory, which stays free

_MAP_SHARED, _MAP_POPULATE, _PROT_READ = 0x1, 0x8000, 0x1


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a holder has in memory."""

    num_bytes: int
    is_locked: bool

    def __str__(self) -> str:
        lock = "locked" if self.is_locked else "which the kernel may take back"
        return f"{self.num_bytes / 1e9:.2f} GB of weights in memory, {lock}"


class Holder:
    """Holds files from `hold` to `let_go`, or to the end of its process."""

    def __init__(self, free: Callable[[], int] | None = None) -> None:
        """`free`: bytes of memory that there are."""
        self._free = free or free_memory
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for name in ("mlock", "munmap"):
            getattr(self._libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._mapped: list[tuple[int, int]] = []  # addresses and bytes

    def hold(self, paths: Iterable[str]) -> Held:
        """Reads files into memory. CapacityError, before anything is read, when they do not fit into what is free."""
        sizes = {os.path.realpath(path): os.stat(path).st_size for path in paths}
        num_bytes, free = sum(sizes.values()), self._free()
        if num_bytes > (1 - MARGIN) * free:
            told = f"{num_bytes / 1e9:.2f} GB of weights do not fit into the {free / 1e9:.2f} GB of memory"
            raise CapacityError(f"{told} that are free on the node, of which {MARGIN:.0%} stay free")
        is_locked = True
        for path, size in sizes.items():
            is_locked &= size == 0 or self._map(path, size)
        return Held(num_bytes=num_bytes, is_locked=is_locked)

    def beat(self) -> None:
        """Answers: it is there."""

    def let_go(self) -> None:
        for address, size in self._mapped:
            self._libc.munmap(address, size)
        self._mapped.clear()

    def _map(self, path: str, size: int) -> bool:
        """Whether it is locked as well."""
        fd = os.open(path, os.O_RDONLY)
        try:
            address = self._libc.mmap(None, size, _PROT_READ, _MAP_SHARED | _MAP_POPULATE, fd, 0)
        finally:
            os.close(fd)
        if address in (None, ctypes.c_void_p(-1).value):
            raise ServiceError(f"{path} cannot be read into memory: {os.strerror(ctypes.get_errno())}")
        self._mapped.append((address, size))
        return bool(self._libc.mlock(address, size) == 0)


def free_memory() -> int:
    """Bytes that the system could give, what it can take from the page cache counted."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    raise ServiceError("this system does not say how much memory is free")
