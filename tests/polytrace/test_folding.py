from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytrace.errors import WireError
from polytrace.folding import MAX_DEPTH, fold, fold_column, size_of, unfold, unfold_column

LIMIT = 1 << 63


def is_integer(value: Any) -> bool:
    return type(value) is int


def sent(folded: Any) -> Any:
    return json.loads(json.dumps(folded))


@st.composite
def loops(draw: st.DrawFn) -> list[int]:
    """What loops in loops write, with some noise."""
    values = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=5))
    for _ in range(draw(st.integers(0, 3))):
        values = values * draw(st.integers(1, 4)) + draw(st.lists(st.integers(-3, 3), max_size=2))
    return values


@given(loops())
def test_what_is_folded_unfolds_to_itself(values: list[int]) -> None:
    folded = sent(fold(values))
    assert size_of(folded, is_integer, 1 << 20) == len(values)
    assert unfold(folded, len(values), is_integer) == values


@given(st.lists(st.integers(-LIMIT, LIMIT - 1), min_size=1, max_size=20) | loops())
def test_a_column_comes_back(values: list[int]) -> None:
    column = unfold_column(sent(fold_column(values)), len(values), -LIMIT, LIMIT)
    assert (column if isinstance(column, list) else [column] * len(values)) == values


@pytest.mark.parametrize(
    ("values", "room"),
    [
        ([-1] * 5000, 2),
        (list(range(5000)), 30),
        ([number % 8 for number in range(5000)], 60),
        ([number // 8 for number in range(5000)], 60),
        ([number // 8 % 32 for number in range(5000)], 80),
        ([3, 1, 3, 2, 1, 2] * 900, 30),
        ([7 * (number % 96) + number // 96 for number in range(9600)], 60),
    ],
)
def test_columns_of_loops_take_a_few_bytes(values: list[int], room: int) -> None:
    column = json.dumps(fold_column(values))
    assert len(column) <= room
    assert unfold_column(json.loads(column), len(values), -1, 1 << 20) in (values, values[0])


def test_irregular_values_take_their_own_room() -> None:
    values = random.Random(0).choices(range(1000), k=2000)
    assert len(json.dumps(fold_column(values))) <= len(json.dumps(values))


def test_long_stretches_that_repeat_far_apart_are_found_in_linear_time() -> None:
    """A naive search compares the whole stretch again from each of its places: 100 million steps here."""
    chosen = random.Random(0)
    stretch, gap = ([chosen.randrange(1 << 40) for _ in range(10_000)] for _ in range(2))
    assert fold(stretch + gap + gap[:7] + stretch) == stretch + gap + gap[:7] + stretch
    assert len(fold((stretch + gap) * 3)) == 1


@pytest.mark.parametrize(
    "folded",
    [7, "7", {}, [[]], [[3]], [[0, 1]], [[-1, 1]], [[True, 1]], [[2.0, 1]], [None], [True], [1.0], [[1 << 70, 1]]],
)
def test_what_is_no_folded_sequence_is_refused(folded: Any) -> None:
    with pytest.raises(WireError):
        size_of(folded, is_integer, 1 << 20)


def test_deep_repeats_are_refused() -> None:
    folded: Any = [1]
    for _ in range(MAX_DEPTH):
        folded = [[1, *folded]]
    assert size_of(folded, is_integer, 10) == 1
    with pytest.raises(WireError, match="nest deeper"):
        size_of([[1, *folded]], is_integer, 10)


def test_lengths_are_compared_before_anything_is_unfolded() -> None:
    with pytest.raises(WireError, match="more than 5 values"):
        unfold([[1 << 2, [1 << 2, 0]]], 5, is_integer)
    with pytest.raises(WireError, match="4 values where 5 belong"):
        unfold([[4, 0]], 5, is_integer)


def test_a_column_keeps_to_its_bounds() -> None:
    for column in (8, [8], {"steps": [4, 4]}, -1, {"steps": [0, -1]}):
        with pytest.raises(WireError, match="in a column of integers from 0 to 7"):
            unfold_column(column, 2 if isinstance(column, dict) else 1, 0, 8)
