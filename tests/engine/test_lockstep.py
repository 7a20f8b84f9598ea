"""Lanes in step: who goes when, and that none is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from engine.lockstep import in_step, stop
from polytrace.errors import ServiceError


@pytest.fixture(autouse=True)
def no_lane_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_lanes_stop_together_and_go_on_with_their_own_answers_in_their_order() -> None:
    told: list[str] = []

    def lane(number: int) -> None:
        for place in ("a", "b"):
            told.append(f"{number} to {place}")
            told.append(f"{number} has {stop(place, number)}")

    def meet(place: str, values: list[int]) -> list[int]:
        told.append(f"all at {place}")
        return [sum(values) + value for value in values]

    in_step([lambda number=number: lane(number) for number in (1, 2)], meet)  # type: ignore[misc]
    assert told == [
        "1 to a",
        "2 to a",
        "all at a",
        "1 has 4",
        "1 to b",
        "2 has 5",
        "2 to b",
        "all at b",
        "1 has 4",
        "2 has 5",
    ]


def test_what_a_lane_raises_ends_the_others_where_they_have_stopped() -> None:
    cleaned: list[int] = []

    def good() -> None:
        try:
            stop("a", 1)
            stop("b", 1)
        finally:
            cleaned.append(1)

    def bad() -> None:
        stop("a", 2)
        raise MemoryError("too much")

    with pytest.raises(MemoryError, match="too much"):
        in_step([good, bad, good], lambda _place, values: values)
    assert cleaned == [1, 1]


def test_what_is_raised_where_they_meet_ends_all_lanes() -> None:
    def fail(_place: str, _values: list[int]) -> list[int]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_step([lambda: stop("a", 1)] * 3, fail)


def test_lanes_that_come_to_different_places_are_told_apart() -> None:
    with pytest.raises(ServiceError, match="different modules"):
        in_step([lambda: stop("a", 1), lambda: stop("b", 1)], lambda _place, values: values)
    with pytest.raises(ServiceError, match="different modules"):
        in_step([lambda: stop("a", 1), lambda: None], lambda _place, values: values)


def test_lanes_without_stops_run_one_after_another() -> None:
    told: list[int] = []
    in_step([lambda: told.append(1), lambda: told.append(2)], lambda _place, values: values)
    assert told == [1, 2]
