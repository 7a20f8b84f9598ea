"""The forest of rows, against what the rules say of every single row."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from scheduling.forest import Forest, Placed, grow
from scheduling.plan import Edit
from tests.scheduling.forests import KEYS, LAYERS, any_sequence, placed, variants

Row = tuple[int, int, int]  # segment, level, position


def find(forest: Forest, sequence: int, level: int, position: int) -> Row | None:
    """The row of a sequence's position, as the segments say; None when it is not there."""
    segment = forest.places[sequence]
    while position < forest.segments[segment].starts[level]:
        parent = forest.segments[segment].parent
        assert parent is not None, "a root has all positions"
        segment = parent
    there = forest.segments[segment]
    is_live = position in there.head if level == len(there.stops) else position < there.stops[level]
    return (segment, level, position) if is_live else None


def needed(sequence: Placed) -> list[tuple[int, int]]:
    """(level, position) of every row that a sequence needs."""
    rows = [(level, position) for level, stop in enumerate(sequence.cone.needs) for position in range(stop)]
    return rows + [(len(sequence.cone.needs), position) for position in sequence.cone.head]


def is_same(a: Placed, b: Placed, level: int, position: int) -> bool:
    """Whether two sequences have equal rows there by the rules."""

    def seen(sequence: Placed) -> set[Edit]:
        return {edit for edit in sequence.cone.edits if edit.level <= level and edit.position <= position}

    return a.tokens[: position + 1] == b.tokens[: position + 1] and seen(a) == seen(b)


def own_rows(forest: Forest) -> set[Row]:
    """Every row that the segments have."""
    return {
        (number, level, position)
        for number, segment in enumerate(forest.segments)
        for level in range(len(segment.starts))
        for position in (
            range(segment.starts[level], segment.stops[level]) if level < len(segment.stops) else segment.head
        )
    }


def check(sequences: Sequence[Placed], num_layers: int = LAYERS) -> Forest:
    """Grows a forest and holds every row of it against the rules."""
    forest = grow(sequences, num_layers)
    for number, segment in enumerate(forest.segments):
        assert len(segment.starts) == num_layers + 1 and len(segment.stops) == num_layers
        assert list(segment.starts) == sorted(segment.starts, reverse=True)
        assert list(segment.stops) == sorted(segment.stops, reverse=True)
        assert list(segment.head) == sorted(set(segment.head))
        assert all(position >= segment.starts[-1] for position in segment.head)
        if segment.parent is None:
            assert not any(segment.starts)
        owner = sequences[forest.places.index(number)]
        assert segment.tokens == owner.tokens[segment.starts[0] : segment.stops[0]]
    _check_rows_are_what_they_grow_from(sequences, forest)
    # Nobody's row is anybody else's, and there is no row that nobody needs.
    wanted = {(place, *row) for place, sequence in enumerate(sequences) for row in needed(sequence)}
    found = {find(forest, *row) for row in wanted}
    assert found == own_rows(forest), "every needed row is there, and no other"
    users: dict[Row, list[int]] = {}
    for place, sequence in enumerate(sequences):
        for level in range(num_layers + 1):
            for position in range(len(sequence.tokens)):
                if (row := find(forest, place, level, position)) is not None:
                    users.setdefault(row, []).append(place)
    for (_, level, position), sharers in users.items():
        first = sequences[sharers[0]]
        for other in sharers[1:]:
            assert first.domain == sequences[other].domain is not None
            assert is_same(first, sequences[other], level, position)
    rows = [sum(level == row[1] for row in own_rows(forest)) for level in range(num_layers)]
    assert forest.layer_rows == tuple(rows)
    return forest


def _check_rows_are_what_they_grow_from(sequences: Sequence[Placed], forest: Forest) -> None:
    """Each row has its row of the level before, and the rows that it attends to."""
    place_of = {segment: place for place, segment in reversed(list(enumerate(forest.places)))}
    for segment, level, position in own_rows(forest):
        place = place_of[segment]
        if level:
            assert find(forest, place, level - 1, position) is not None
        if level < len(forest.layer_rows):
            assert all(find(forest, place, level, earlier) is not None for earlier in range(position))


@settings(max_examples=200)
@given(st.lists(any_sequence(), max_size=7))
def test_every_sequence_has_its_rows_and_shares_only_equal_ones(sequences: list[Placed]) -> None:
    forest = check(sequences)
    event(f"{sum(segment.parent is not None for segment in forest.segments)} forks")


@settings(max_examples=200)
@given(variants())
def test_sequences_with_much_in_common_share_it_and_nothing_else(sequences: list[Placed]) -> None:
    forest = check(sequences)
    event(f"depth {max(depths(forest))}")
    assert sum(forest.layer_rows) <= sum(sum(sequence.cone.needs) for sequence in sequences)


@settings(max_examples=50)
@given(st.one_of(variants(), st.lists(any_sequence(), max_size=7)))
def test_without_a_domain_nothing_is_shared(sequences: list[Placed]) -> None:
    alone = [replace(sequence, domain=None) for sequence in sequences]
    forest = check(alone)
    assert len(set(forest.places)) == len(alone)
    assert all(segment.parent is None for segment in forest.segments)
    assert sum(forest.layer_rows) == sum(sum(sequence.cone.needs) for sequence in sequences)


@settings(max_examples=50)
@given(variants())
def test_equal_sequences_of_a_domain_are_one(sequences: list[Placed]) -> None:
    forest = check([*sequences, *sequences])
    assert forest.places[: len(sequences)] == forest.places[len(sequences) :]
    assert forest.layer_rows == grow(sequences, LAYERS).layer_rows


def test_a_forest_is_the_same_in_every_process() -> None:
    """Several shards and the certificate must agree, whatever their hashes are."""
    program = """
        from scheduling.forest import grow
        from scheduling.plan import Edit
        from tests.scheduling.forests import placed
        edits = [Edit(l, p, bytes([k])) for l in range(3) for p in range(6) for k in range(3)]
        sequences = [placed(range(n), edits[i:i + 4]) for n in (6, 7) for i in range(len(edits) - 4)]
        print(grow(sequences, 3))
    """
    printed = {
        subprocess.run(
            [sys.executable, "-c", "\n".join(line.strip() for line in program.splitlines())],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


# What is shared


LENGTH = 9


def sweep(num_layers: int, positions: Sequence[int]) -> list[Placed]:
    """One prompt with one edit, for every layer and position."""
    return [
        placed(range(LENGTH), [Edit(level, position, b"patch")], head=[LENGTH - 1], num_layers=num_layers)
        for level in range(num_layers + 1)
        for position in positions
    ]


def rows_of_forks(num_layers: int, positions: Sequence[int]) -> int:
    return sum((num_layers - level) * (LENGTH - p) for level in range(num_layers + 1) for p in positions)


def test_a_sweep_over_layers_and_positions_costs_its_base_and_its_forks() -> None:
    positions = (0, *range(2, LENGTH))
    base = placed(range(LENGTH), head=[LENGTH - 1], num_layers=6)
    forest = check([base, *sweep(6, positions)], 6)
    assert sum(forest.layer_rows) == 6 * LENGTH + rows_of_forks(6, positions)
    assert set(depths(forest)) == {0, 1}
    assert forest.layer_rows[0] == LENGTH + sum(LENGTH - position for position in positions)


def test_a_sweep_without_a_clean_run_forks_from_the_edit_that_acts_last() -> None:
    positions = (0, *range(2, LENGTH))
    forest = check(sweep(6, positions), 6)
    assert sum(forest.layer_rows) == 6 * LENGTH + rows_of_forks(6, positions)
    assert forest.segments[forest.places[-1]].parent is None
    assert all(forest.segments[place].parent is not None for place in forest.places[1:-1])


def test_prompts_that_begin_alike_have_the_beginning_once() -> None:
    prefixes = [[prefix] * 40 for prefix in range(3)]
    questions = [[*prefix, 7, number, number] for prefix in prefixes for number in range(10, 16)]
    forest = check([placed(question) for question in questions])
    assert forest.layer_rows == (3 * (40 + 1) + len(questions) * 2,) * LAYERS


def test_prompts_over_one_prefix_fork_from_it_and_not_from_each_other() -> None:
    forest = check([placed([*range(20), number, 99]) for number in range(30, 60)])
    assert max(depths(forest)) == 1


def test_prompts_that_go_on_where_another_ends_fork_from_it() -> None:
    forest = check([placed(range(length)) for length in (12, 3, 9, 6)])
    assert forest.layer_rows == (12,) * LAYERS


def test_edits_in_common_are_made_once() -> None:
    common = Edit(0, 2, b"common")
    window = [placed(range(20), [common, Edit(2, position, b"own")], num_layers=6) for position in range(5, 15)]
    forest = check(window, 6)
    first, other = 6 * 20, sum(4 * (20 - position) for position in range(5, 14))
    assert sum(forest.layer_rows) == first + other


def test_a_fork_that_would_save_less_than_it_costs_has_all_rows_itself() -> None:
    sequences = [placed(range(9)), placed([0, *range(10, 18)])]
    assert all(segment.parent is None for segment in check(sequences).segments)


def test_rows_end_where_neither_a_sequence_nor_its_forks_need_them() -> None:
    base = placed(range(9), needs=(9, 0, 0), head=())
    late = placed(range(9), [Edit(2, 5, b"a")], needs=(7, 7, 7), head=(6,))
    forest = check([base, late])
    root, fork = (forest.segments[place] for place in forest.places)
    assert (root.stops, root.head) == ((9, 7, 5), ())
    assert (fork.starts, fork.stops, fork.head) == ((9, 9, 5, 5), (7, 7, 7), (6,))


def test_segments_of_like_geometry_are_neighbours() -> None:
    edits = [Edit(level, position, key) for key in KEYS for level in (0, 1) for position in (3, 5)]
    forest = check([placed(range(9)), *(placed(range(9), [edit]) for edit in edits)])
    shapes = [(segment.parent, segment.starts, segment.stops) for segment in forest.segments]
    assert all(a == b for a, b in zip(shapes[1::2], shapes[2::2], strict=True))


def test_the_rows_of_sets_of_edits_are_those_of_the_sets_alone() -> None:
    pool = [Edit(1, 3, b"a"), Edit(1, 6, b"b"), Edit(2, 2, b"c")]
    sets = [chosen for size in range(4) for chosen in combinations(pool, size)]
    forest = check([placed(range(9), chosen) for chosen in sets])
    assert len(forest.segments) == 8 and sum(segment.parent is None for segment in forest.segments) == 1


def depths(forest: Forest) -> list[int]:
    """How many forks deep each segment is."""
    found = []
    for segment in forest.segments:
        depth = 0
        while segment.parent is not None:
            segment, depth = forest.segments[segment.parent], depth + 1
        found.append(depth)
    return found or [0]


# Time


def many_edits(count: int) -> list[Placed]:
    edits = [Edit(n % 33, n // 33 % 64, n.to_bytes(16, "big")) for n in range(count)]
    return [placed(range(64), [edit], head=[63], num_layers=32) for edit in edits]


def many_prefixes(count: int) -> list[Placed]:
    return [placed([*range(50), n % 7, 1000 + n], head=[51], num_layers=32) for n in range(count)]


def many_windows(count: int) -> list[Placed]:
    edits = [Edit(n % 33, n // 33 % 64, n.to_bytes(16, "big")) for n in range(count + 20)]
    return [placed(range(64), edits[n : n + 20], head=[63], num_layers=32) for n in range(count)]


@pytest.mark.parametrize(
    ("make", "most"),
    [(many_edits, 10_000), (many_prefixes, 10_000), (many_windows, 2_000)],
)
def test_sequences_grow_in_linear_time(
    make: Callable[[int], list[Placed]], most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for count in (most // 4, most // 2, most):
        sequences = make(count)
        began = time.process_time()
        grow(sequences, 32)
        told.append(f"{count:,} in {time.process_time() - began:.2f} s")
    with capsys.disabled():
        print(f"\n{make.__name__.replace('_', ' ')}: {', '.join(told)}")
