"""A folder for weights that lie on disk, of one process: it goes with whoever made it.

A process that was killed leaves its folder behind; the next one to make a folder on the machine removes it. Whose
process lives holds a lock on a file in its folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

_PREFIX = "polytrace-offload-"
_LOCK = "in-use"


class OffloadFolder:
    """Made when somebody asks for its path; gone when it is closed or forgotten, or the process ends."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._end: weakref.finalize[[Path, int], OffloadFolder] | None = None

    @property
    def path(self) -> Path:
        """Of the folder, which is there from now on; in the folder for temporary files (TMPDIR)."""
        if self._path is None:
            _remove_left()
            # its name is one that others look at only when its lock is held
            made = Path(tempfile.mkdtemp(prefix=f"new-{_PREFIX}"))
            lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._path = made.rename(made.with_name(made.name.removeprefix("new-")))
            self._end = weakref.finalize(self, _remove, self._path, lock)
        return self._path

    def close(self) -> None:
        """Removes it, if it was made."""
        if self._end is not None:
            self._end()


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_left() -> None:
    """Removes the folders of processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or just gone
            lock = os.open(path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
