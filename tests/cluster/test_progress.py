"""Lines about loading: every shard's own words, and now and then one for all of them, with the rate."""

from __future__ import annotations

from cluster.progress import Loading
from engine.reading import Reading


def far(done: int, total: int) -> Reading:
    return Reading(read_bytes=done, total_bytes=total, seconds=1.0)


def test_shards_are_told_of_together_and_one_by_one() -> None:
    lines: list[str] = []
    loading = Loading(["stage 0 rank 0", "stage 1 rank 0", "stage 2 rank 0"], lines.append, tell_s=0.0)
    loading.hear(1, "layers 3-5 of 9")
    loading.hear(1, far(10**9, 4 * 10**9))
    loading.hear(0, far(3 * 10**9, 4 * 10**9))
    loading.hear(1, far(2 * 10**9, 4 * 10**9))
    assert lines[0] == "stage 1 rank 0: layers 3-5 of 9"
    assert lines[1].startswith("loading: read 1.00 of 4.00 GB, ") and lines[1].endswith("; by shard -, 25 %, -")
    assert lines[3].startswith("loading: read 5.00 of 8.00 GB, ") and lines[3].endswith("; by shard 75 %, 50 %, -")
    assert "MB/s" in lines[3]


def test_many_tellings_are_few_lines() -> None:
    lines: list[str] = []
    loading = Loading(["stage 0 rank 0"], lines.append)
    for done in range(1000):
        loading.hear(0, far(done, 1000))
    loading.hear(0, "loaded")
    assert lines == ["stage 0 rank 0: loaded"]
