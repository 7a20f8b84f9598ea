"""Views of the packed stream, against hand-written padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.streams import Streams, positions_of
from engine.views import InvokeRows, RowView
from scheduling.forest import Placed, grow
from scheduling.plan import NO_ROWS, PROLOGUE, Edit, PassId, Plan, Segment, View
from tests.scheduling.forests import LAYERS, any_sequence, placed, variants

CPU = torch.device("cpu")


def view_of(*lengths: int, kept: tuple[int, ...] = ()) -> View:
    """Sequences that are a segment each."""
    segments = tuple(range(len(lengths)))
    return View(member=0, invoke=0, lengths=lengths, segments=segments, kept_columns=kept)


def rows_from(starts: list[int], *lengths: int, columns: tuple[int, ...] | None = None) -> RowView:
    """A view of segments whose rows begin there."""
    named = range(max(lengths)) if columns is None else columns
    return RowView(view_of(*lengths), named, lambda segment, position: starts[segment] + position, CPU)


def planned(sequences: list[Placed], kept: tuple[int, ...] = ()) -> tuple[Plan, InvokeRows]:
    """A pass of one invoke."""
    forest = grow(sequences, LAYERS)
    lengths = tuple(len(sequence.tokens) for sequence in sequences)
    view = View(member=0, invoke=0, lengths=lengths, segments=forest.places, kept_columns=kept)
    plan = Plan(
        pass_id=PassId(1),
        segments=forest.segments,
        layer_rows=forest.layer_rows,
        views=(view,),
        members=(),
        keeps=(),
        until=PROLOGUE,
        num_stages=1,
    )
    return plan, InvokeRows(view, Streams(plan, 1, CPU, is_fixed=False))


def numbered(rows: int) -> torch.Tensor:
    """`[1, rows, 1]`: each row says its number, from 1."""
    return torch.arange(1.0, rows + 1).view(1, rows, 1)


def test_equal_lengths_alias_the_stream() -> None:
    packed = torch.arange(20.0).view(1, 10, 2)
    value = rows_from([2, 5], 3, 3).read(packed)
    assert value.shape == (2, 3, 2)
    assert value.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert torch.equal(value.flatten(0, 1), packed[0, 2:8])


def test_rows_apart_are_copied_in_the_order_of_the_sequences() -> None:
    packed = numbered(10)
    value = rows_from([6, 1], 3, 3).read(packed)
    assert value[..., 0].tolist() == [[7, 8, 9], [2, 3, 4]]
    assert value.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()


def test_ragged_views_are_left_padded_with_zeros() -> None:
    packed = torch.arange(1.0, 21.0).view(1, 10, 2)
    value = rows_from([4, 5], 1, 3).read(packed)
    expected = torch.zeros(2, 3, 2)
    expected[0, 2:] = packed[0, 4:5]
    expected[1] = packed[0, 5:8]
    assert torch.equal(value, expected)


def test_a_narrow_view_has_its_columns_only() -> None:
    view = rows_from([4, 5], 1, 3, columns=(0, 2))
    assert view.shape == (2, 2)
    assert view.read(numbered(10))[..., 0].tolist() == [[0, 5], [6, 8]]


def test_columns_of_one_row_each_are_a_run() -> None:
    view = rows_from([2, 5], 3, 3, columns=(2,))
    assert not view.is_run and view.rows.tolist() == [4, 7]
    assert rows_from([2, 3], 1, 1).is_run


def test_the_part_of_a_value_is_what_has_rows() -> None:
    view = rows_from([4, 5], 1, 3)
    assert view.part(torch.arange(6.0).view(2, 3, 1))[:, 0].tolist() == [2, 3, 4, 5]
    assert view.rows.tolist() == [4, 5, 6, 7] and view.cells.tolist() == [2, 3, 4, 5]


def test_rows_that_have_ended_read_zero_and_take_nothing() -> None:
    view = RowView(view_of(3), range(3), lambda _, position: position if position < 2 else None, CPU)
    assert not view.is_whole and view.num_rows == 2
    assert view.read(numbered(5))[..., 0].tolist() == [[1, 2, 0]]
    assert view.part(torch.ones(1, 3, 4)).shape == (2, 4)


def test_a_view_without_any_row_is_all_zeros() -> None:
    view = RowView(view_of(3), range(3), lambda *_: None, CPU)
    assert not view.read(numbered(5)).any() and view.part(torch.ones(1, 3, 2)).shape == (0, 2)


def test_a_fork_sees_its_parents_rows_before_its_own() -> None:
    base, patched = placed(range(20)), placed(range(20), [Edit(1, 15, b"a")])
    _, rows = planned([base, patched])
    before, behind = rows.at(0, None), rows.at(1, None)
    assert before.read(numbered(20))[..., 0].tolist() == [list(range(1, 21))] * 2
    assert behind.read(numbered(25))[1, :, 0].tolist() == [*range(1, 16), *range(21, 26)]
    assert rows.at(1, (14, 15)).read(numbered(25))[..., 0].tolist() == [[15, 16], [15, 21]]


def test_views_of_levels_that_are_alike_are_made_once() -> None:
    _, rows = planned([placed(range(20)), placed(range(20), [Edit(2, 15, b"a")])])
    assert rows.at(0, None) is rows.at(1, None) is not rows.at(2, None)
    assert rows.at(0, (1,)) is rows.at(1, (1,)) is not rows.at(0, (2,))


def test_kept_columns_skip_pads() -> None:
    sequences = [placed([9], head=[0]), placed([1, 2, 3], head=[1, 2])]
    _, rows = planned(sequences, kept=(1, 2))
    streams = rows.streams
    assert len(streams.kept) == 3
    value = rows.kept((1, 2)).read(numbered(3))[..., 0]
    assert value[0, 0] == 0 and value.flatten().sort().values.tolist() == [0, 1, 2, 3]
    assert torch.equal(rows.kept((2,)).read(numbered(3))[..., 0], value[:, 1:])


@settings(max_examples=50)
@given(
    st.one_of(variants(), st.lists(any_sequence(), min_size=1, max_size=6)),
    st.integers(0, LAYERS),
    st.one_of(st.none(), st.sets(st.integers(0, 9), min_size=1)),
)
def test_a_view_reads_the_rows_of_its_positions(sequences: list[Placed], level: int, chosen: set[int] | None) -> None:
    plan, rows = planned(sequences)
    longest = max(len(sequence.tokens) for sequence in sequences)
    columns = None if chosen is None else tuple(sorted({column % longest for column in chosen}))
    stream = rows.streams.at(level)
    value = rows.at(level, columns).read(numbered(stream.num_padded))[..., 0]
    for place, sequence in enumerate(sequences):
        for number, column in enumerate(range(longest) if columns is None else columns):
            position = column - longest + len(sequence.tokens)
            row = stream.row(plan.views[0].segments[place], position) if position >= 0 else None
            assert value[place, number] == (0 if row is None else row + 1)


def test_a_view_of_a_later_step_counts_its_columns_from_where_it_begins_and_reads_nothing_of_what_has_ended() -> None:
    """Three sequences of one token each, at positions of their own; the second has ended."""
    segments = tuple(
        Segment(parent=None, starts=(start,) * (LAYERS + 1), stops=(start + 1,) * LAYERS, head=(start,), tokens=(7,))
        for start in (40, 9)
    )
    view = View(member=0, invoke=0, lengths=(1, 1, 1), segments=(0, NO_ROWS, 1), kept_columns=(0,), begins=(40, 0, 9))
    plan = Plan(
        pass_id=PassId(1),
        segments=segments,
        layer_rows=(2,) * LAYERS,
        views=(view,),
        members=(),
        keeps=(),
        until=PROLOGUE,
        num_stages=1,
    )
    streams = Streams(plan, 1, CPU, is_fixed=False)
    rows = InvokeRows(view, streams)
    for found in (rows.at(0, None), rows.behind(1, (0,)), rows.kept(None)):
        assert found.read(numbered(16))[..., 0].tolist() == [[1], [0], [2]]
        assert found.part(torch.tensor([[5], [6], [7]])).tolist() == [5, 7]
    assert streams.positions()[:3] == [40, 9, 0] and streams.kept == [0, 1]


def test_a_ragged_view_that_begins_later_is_padded_as_any_other() -> None:
    view = View(member=0, invoke=0, lengths=(1, 3), segments=(0, 1), kept_columns=(), begins=(10, 20))
    assert list(positions_of(view, range(3))) == [(0, [-1, -1, 10]), (1, [20, 21, 22])]
    assert list(positions_of(view, (2, 0))) == [(0, [10, -1]), (1, [22, 20])]
