"""Files are in memory while they are held, and nothing is read that does not fit."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cluster.holder import Holder, free_memory
from polytrace.errors import CapacityError

SIZE = (8 << 20) + 123


def written(path: Path) -> str:
    """A file that is on the disk and not in memory, as far as its file system can do without."""
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return str(path)


def resident_bytes(path: str) -> int:
    """Of a file that this process has mapped: as much as is in memory now."""
    mapped = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf" {re.escape(path)}\n(?:\w+: .*\n)*?Rss: +(\d+) kB\n", mapped)
    return sum(int(kib) << 10 for kib in sizes)


def test_held_files_are_in_memory_and_survive_that_others_do_without_them(tmp_path: Path) -> None:
    paths = [written(tmp_path / name) for name in ("a", "b")]
    own = Holder()
    held = own.hold([*paths, paths[0]])
    assert held.num_bytes == 2 * SIZE and "0.02 GB of weights in memory" in str(held)
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert [resident_bytes(path) >= SIZE for path in paths] == [True, True]
    own.let_go()
    assert [resident_bytes(path) for path in paths] == [0, 0]


def test_what_does_not_fit_into_the_memory_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    assert free_memory() > 0
    own = Holder(lambda: SIZE)
    with pytest.raises(CapacityError, match=r"0\.01 GB of weights do not fit into the 0\.01 GB of memory"):
        own.hold([path])
    assert resident_bytes(path) == 0
