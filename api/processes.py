"""What this process has started, directly or not, found through /proc: so that nothing is left behind.

On Linux a supervisor adopts the orphans among its descendants (`adopt_orphans`), so a process cannot leave the tree
by outliving its parent. Elsewhere there is no such thing, and `descendants` is empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on a descendant whose parent dies becomes this process' child."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(*, keep: Collection[int] = ()) -> list[int]:
    """Living processes under this one, without the trees of `keep`."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(folder.name))
            elif int(fields[1]) == os.getpid() and int(folder.name) not in keep:
                _reap(int(folder.name))
    found: list[int] = []
    open_ = [os.getpid()]
    while open_:
        for pid in children.get(open_.pop(), []):
            if pid not in keep:
                found.append(pid)
                open_.append(pid)
    return found


def end_descendants(grace_s: float, *, keep: Collection[int] = ()) -> list[int]:
    """Gives those that are ending already a moment and kills the rest; which ones had to be killed."""
    deadline = time.monotonic() + grace_s
    while (left := descendants(keep=keep)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while left and descendants(keep=keep) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _reap(pid: int) -> None:
    """An adopted orphan that has ended: nobody else waits for it."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
