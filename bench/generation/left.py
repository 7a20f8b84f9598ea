"""What many short generations leave behind: nothing in the cache, and a process as large as before."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.generation.ours import Ours
from bench.generation.users import User
from scheduling.loop import step

_TURNS = 4  # the first one grows what the process keeps for good


def left(ours: Ours, users: Sequence[User]) -> dict[str, Any]:
    """Bytes in the cache behind all of them; Python objects and the process's size behind each quarter."""
    size = max(1, len(users) // _TURNS)
    resident, objects = [], []
    start = time.perf_counter()
    for turn in range(_TURNS):
        ours.merged(ours.programs(users[turn * size : (turn + 1) * size]))
        while ours.backend.scheduler.has_work():  # shards hear of what has ended in the next pass
            step(ours.backend.scheduler, ours.backend.shards)
        gc.collect()
        objects.append(len(gc.get_objects()))
        resident.append(_resident_mib())
    return {
        "generations": _TURNS * size,
        "seconds": time.perf_counter() - start,
        "cache_bytes": ours.backend.shard.store.held_bytes,
        "objects": objects,
        "resident_mib": resident,
    }


def _resident_mib() -> float:
    """Of this process, without what the C library keeps for later."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
