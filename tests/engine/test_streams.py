"""Where rows lie at every level, against lists of rows written down one by one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.streams import Streams, padded
from scheduling.forest import Placed, grow
from scheduling.plan import MIN_ROWS, PROLOGUE, Edit, PassId, Plan, View
from tests.scheduling.forests import LAYERS, any_sequence, placed, variants

CPU = torch.device("cpu")

Rows = list[tuple[int, int]]  # (segment, position)

some = st.one_of(variants(), st.lists(any_sequence(), min_size=1, max_size=7))


def plan_of(sequences: list[Placed], kept: tuple[int, ...] = (), together: int = 1) -> Plan:
    """A pass over sequences, as many to an invoke as said."""
    forest = grow(sequences, LAYERS)
    views = tuple(
        View(
            member=0,
            invoke=first // together,
            lengths=tuple(len(sequence.tokens) for sequence in sequences[first : first + together]),
            segments=forest.places[first : first + together],
            kept_columns=kept,
        )
        for first in range(0, len(sequences), together)
    )
    return Plan(
        pass_id=PassId(1),
        segments=forest.segments,
        layer_rows=forest.layer_rows,
        views=views,
        members=(),
        keeps=(),
        until=PROLOGUE,
        num_stages=1,
    )


def rows_at(plan: Plan, level: int) -> Rows:
    """The rows of a level in their order."""
    if level == LAYERS:
        return [(number, position) for number, segment in enumerate(plan.segments) for position in segment.head]
    return [
        (number, position)
        for number, segment in enumerate(plan.segments)
        for position in range(segment.starts[level], segment.stops[level])
    ]


def owner(plan: Plan, segment: int, level: int, position: int) -> tuple[int, int]:
    """Whose row a position is at a level, there or not."""
    while position < plan.segments[segment].starts[level]:
        parent = plan.segments[segment].parent
        assert parent is not None
        segment = parent
    return segment, position


def streams_of(plan: Plan, multiple: int = 1, *, is_fixed: bool = False) -> Streams:
    return Streams(plan, multiple, CPU, is_fixed=is_fixed)


@settings(max_examples=50)
@given(some, st.sampled_from([1, 8, 24]), st.booleans())
def test_a_level_has_its_rows_in_order_and_is_padded(sequences: list[Placed], multiple: int, is_fixed: bool) -> None:
    plan = plan_of(sequences)
    streams = streams_of(plan, multiple, is_fixed=is_fixed)
    for level in range(LAYERS + 1):
        stream, rows = streams.at(level), rows_at(plan, level)
        assert stream.num_rows == len(rows)
        assert stream.num_padded >= max(len(rows), MIN_ROWS) and stream.num_padded % multiple == 0
        if not (is_fixed and level == LAYERS):
            assert stream.num_padded == padded(len(rows), multiple) < max(len(rows), MIN_ROWS) + multiple
        for segment, view in enumerate(plan.segments):
            for position in range(view.starts[0] + len(view.tokens)):
                found = owner(plan, segment, level, position)
                assert stream.row(segment, position) == (rows.index(found) if found in rows else None)


@settings(max_examples=50)
@given(some)
def test_runs_are_the_rows_of_positions_from_one_to_another(sequences: list[Placed]) -> None:
    plan = plan_of(sequences)
    streams = streams_of(plan)
    for level in range(LAYERS):
        stream = streams.at(level)
        for segment, whole in enumerate(plan.segments):
            for stop in {whole.stops[level], min(whole.starts[level], whole.stops[level])}:
                for start in (0, stop // 2):
                    runs = stream.runs(segment, start, stop)
                    found = [row for run in runs for row in range(*run)]
                    assert found == [stream.row(segment, position) for position in range(start, stop)]
                    assert all(first < behind for first, behind in runs)


@settings(max_examples=50)
@given(some, st.sampled_from([1, 24]), st.booleans())
def test_every_row_is_born_from_its_position_at_the_level_before(
    sequences: list[Placed], multiple: int, is_fixed: bool
) -> None:
    plan = plan_of(sequences)
    streams = streams_of(plan, multiple, is_fixed=is_fixed)
    for level in range(1, LAYERS + 1):
        before, rows = rows_at(plan, level - 1), rows_at(plan, level)
        births = streams.births(level)
        if births is None:
            assert before == rows and streams.at(level) is streams.at(level - 1)
            continue
        assert len(births) == streams.at(level).num_padded and births.dtype == torch.long
        expected = [before.index(owner(plan, segment, level - 1, position)) for segment, position in rows]
        assert births[: len(rows)].tolist() == expected
        assert not births[len(rows) :].any()


@settings(max_examples=50)
@given(some, st.sampled_from([1, 24]), st.booleans())
def test_every_row_has_the_token_and_position_of_a_row_of_the_root(
    sequences: list[Placed], multiple: int, is_fixed: bool
) -> None:
    plan = plan_of(sequences)
    streams = streams_of(plan, multiple, is_fixed=is_fixed)
    tokens, positions = streams.tokens(), streams.positions()
    assert len(tokens) == len(positions) == streams.num_root_rows
    first = rows_at(plan, 0)
    assert not any(tokens[len(first) :]) and not any(positions[len(first) :])
    for level in range(LAYERS):
        rows, origins = rows_at(plan, level), streams.origins(level)
        found = list(range(streams.num_root_rows)) if origins is None else origins.tolist()
        assert len(found) == streams.at(level).num_padded
        for (segment, position), origin in zip(rows, found, strict=False):
            whose = sequences[[view.segments[0] for view in plan.views].index(segment)]
            assert (tokens[origin], positions[origin]) == (whose.tokens[position], position)
            assert first[origin] == owner(plan, segment, 0, position)


@settings(max_examples=60)
@given(some)
def test_a_model_that_insists_gets_as_many_rows_behind_its_layers_as_it_was_called_with(
    sequences: list[Placed],
) -> None:
    plan = plan_of(sequences)
    fixed, free = streams_of(plan, is_fixed=True), streams_of(plan)
    assert fixed.num_root_rows == fixed.at(LAYERS).num_padded
    assert fixed.num_root_rows == max(free.at(0).num_padded, free.at(LAYERS).num_padded)
    assert free.num_root_rows == free.at(0).num_padded
    assert [fixed.at(level).num_padded for level in range(LAYERS)] == [
        free.at(level).num_padded for level in range(LAYERS)
    ]


def test_more_rows_behind_the_layers_than_before_them_come_in_as_padding() -> None:
    edits = [Edit(LAYERS, 0, bytes([number])) for number in range(20)]
    sequences = [placed([1, 2], [edit]) for edit in edits]
    plan = plan_of(sequences)
    streams = streams_of(plan, is_fixed=True)
    assert (streams.at(0).num_rows, streams.at(LAYERS).num_rows) == (2, 40)
    assert streams.num_root_rows == 40 and len(streams.tokens()) == 40
    origins = streams.origins(0)
    assert origins is not None and origins.tolist() == list(range(MIN_ROWS))
    assert streams_of(plan).origins(0) is None


def test_levels_that_change_nothing_are_one() -> None:
    plan = plan_of([placed(range(20)), placed(range(20), [Edit(2, 12, b"a")])])
    streams = streams_of(plan)
    assert streams.at(0) is streams.at(1) is not streams.at(2)
    assert streams.births(1) is None is streams.origins(1)
    assert streams.births(2) is not None and streams.origins(2) is not None


@settings(max_examples=50)
@given(some, st.sets(st.integers(0, 9)), st.integers(1, 3))
def test_the_head_runs_on_the_rows_that_somebody_keeps(
    sequences: list[Placed], columns: set[int], together: int
) -> None:
    plan = plan_of(sequences, tuple(sorted(columns)), together)
    streams = streams_of(plan, 8)
    rows = rows_at(plan, LAYERS)
    expected: dict[int, tuple[int, int]] = {}
    for view in plan.views:
        for segment, length in zip(view.segments, view.lengths, strict=True):
            for column in view.kept_columns:
                position = column - max(view.lengths) + length
                if 0 <= position < length and (row := owner(plan, segment, LAYERS, position)) in rows:
                    expected[rows.index(row)] = row
    assert streams.kept == sorted(expected)
    taken = streams.kept_rows()
    if not expected:
        assert taken is None
        return
    assert taken is not None and len(taken) == padded(len(expected), 8)
    assert taken[: len(expected)].tolist() == streams.kept and not taken[len(expected) :].any()
    for view in plan.views:
        for segment, length in zip(view.segments, view.lengths, strict=True):
            for position in range(length):
                row = owner(plan, segment, LAYERS, position)
                kept = rows.index(row) if row in rows else None
                place = streams.kept.index(kept) if kept in streams.kept else None
                assert streams.kept_row(segment, position) == place
