"""Contenders take turns, and a ratio is what it says."""

from __future__ import annotations

import time

import pytest

from bench.race import interval, race, ratio


def test_every_contender_runs_once_a_round_and_once_before() -> None:
    calls: list[str] = []
    seconds = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=20)
    assert calls.count("a") == calls.count("b") == 21
    assert len(seconds["a"]) == len(seconds["b"]) == 20
    rounds = [tuple(calls[start : start + 2]) for start in range(2, 42, 2)]
    assert {("a", "b"), ("b", "a")} == set(rounds), "the order within a round is shuffled"


def test_a_contender_that_takes_longer_has_a_ratio_above_one() -> None:
    seconds = race({"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}, rounds=15)
    slower = ratio(seconds["slow"], seconds["fast"])
    assert 1.5 < slower.low <= slower.median <= slower.high < 4.5
    assert slower.rounds == 15


def test_a_ratio_needs_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


def test_the_interval_of_equal_samples_is_a_point_and_widens_with_their_spread() -> None:
    assert interval([2.0] * 9) == (2.0, 2.0)
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1.0 <= low < 3.0 < high <= 5.0
