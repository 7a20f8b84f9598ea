"""A named pipe that wakes one process: the local channel between gateway and controller.

A ring carries no message: whoever hears it looks into the store. Rings of a burst fall together, a ring that nobody
listens to is lost, so a listener first opens its end and then looks. Known to the millisecond, and unlike a socket's
its path may be long.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path


class Doorbell:
    """One pipe; any number of processes ring, one listens."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._holder: int | None = None  # the thread whose rings wait
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, mode=0o600)

    def ring(self) -> None:
        """Wakes the listener, if there is one. Never blocks."""
        if self._holder == threading.get_ident():
            return
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):  # nobody listens, or the store is gone
                return
            raise
        try:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # full: the listener is awake anyway
                os.write(fd, b"\0")
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """This thread's rings inside become one behind it. For one thread at a time."""
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            self.ring()

    def listen(self) -> int:
        """The listener's file descriptor: readable after a ring."""
        if self._fd is None:
            # open for writing as well, so that the pipe never reads as ended when the last ringer closes it
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        return self._fd

    def quiet(self) -> None:
        """Forgets the rings so far. Call it before looking, never after."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.listen(), 65_536)) == 65_536:
                pass

    def wait(self, timeout_s: float) -> None:
        """Blocks until a ring or until the time is over, and forgets the rings."""
        select.select([self.listen()], [], [], timeout_s)
        self.quiet()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
