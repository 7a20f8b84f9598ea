"""Where each tile of queries finds its keys, against rows looked up one by one."""

from __future__ import annotations

import pytest

from engine.streams import Stream
from engine.tables import TILE_NUMBERS, tile_numbers
from scheduling.plan import RequestId, Segment
from tests.engine.test_attention import forest, fork, root, stream_of


def keys_of(stream: Stream, most: int) -> dict[int, list[int]]:
    """By row of the stream, the rows of all keys up to its own; every row at most once."""
    numbers, num_tiles = tile_numbers(stream, most)
    found: dict[int, list[int]] = {}
    for tile in range(num_tiles):
        row, first, count, own, table = map(int, numbers[tile * TILE_NUMBERS : (tile + 1) * TILE_NUMBERS])
        assert 0 < count <= most
        for place in range(count):
            assert row + place not in found
            positions = range(first + place + 1)
            found[row + place] = [int(numbers[table + n]) if n < own else row + n - first for n in positions]
    return found


def expected(stream: Stream) -> dict[int, list[int]]:
    found = {}
    for segment in range(len(stream.segments)):
        here = stream.own(segment)
        for row, position in enumerate(here, stream.bases[segment]):
            found[row] = [n for run in stream.runs(segment, 0, position + 1) for n in range(*run)]
    return found


@pytest.mark.parametrize("most", [1, 21, 64])
@pytest.mark.parametrize("seed", range(6))
def test_every_row_finds_the_keys_of_its_sequence(seed: int, most: int) -> None:
    stream = forest(seed, 150)
    assert keys_of(stream, most) == expected(stream)


def test_forks_of_a_trunk_find_its_rows_behind_the_stream() -> None:
    trunk = Segment(
        parent=None, trunk=(RequestId("r"), 0), outputs=(0,), starts=(0, 0), stops=(40,), head=(), tokens=()
    )
    stream = stream_of(root(5), trunk, fork(1, 30, 45), fork(2, 33, 40), fork(1, 7, 8))
    found = keys_of(stream, 16)
    assert found == expected(stream)
    assert max(map(max, found.values())) == stream.num_padded + 29  # position 29 of the trunk


def test_forks_of_one_parent_share_its_table() -> None:
    alone, _ = tile_numbers(stream_of(root(100), fork(0, 90, 91)), 64)
    many, _ = tile_numbers(stream_of(root(100), *[fork(0, 90, 91)] * 50), 64)
    assert len(many) - len(alone) == 49 * TILE_NUMBERS


def test_tiles_with_most_keys_come_first() -> None:
    numbers, num_tiles = tile_numbers(stream_of(root(10), root(100), fork(1, 99, 102)), 16)
    tiles = numbers[: num_tiles * TILE_NUMBERS].reshape(num_tiles, TILE_NUMBERS)
    lasts = (tiles[:, 1] + tiles[:, 2]).tolist()
    assert lasts == sorted(lasts, reverse=True) and lasts[0] == 102


def test_a_level_without_rows_has_no_tiles() -> None:
    assert tile_numbers(stream_of(), 16)[1] == 0
    ended = Segment(parent=None, starts=(0, 0), stops=(0,), head=(), tokens=())
    assert tile_numbers(stream_of(ended), 16)[1] == 0
