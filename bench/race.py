"""Ratios that a noisy machine cannot fake: contenders take turns in a shuffled order within one process.

Per round every contender runs once, so slow seconds of the machine fall on all alike; the figure is the median of the
rounds' ratios with a bootstrap interval. Racing a contender against itself gives the noise floor.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times longer one contender takes than another."""

    median: float
    low: float  # 95 % bootstrap interval of the median
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def race(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one round that is not counted. `before` is called ahead of each
    turn, outside its time.
    """
    rng = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    gc.collect()
    gc.disable()  # a collection would fall on whoever's turn it is
    try:
        for _ in range(rounds):
            order = list(contenders)
            rng.shuffle(order)
            for name in order:
                before()
                start = time.perf_counter()
                contenders[name]()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratio of two contenders of one race, from pairs of the same round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, high = interval(ratios, seed=seed)
    return Ratio(median=statistics.median(ratios), low=low, high=high, rounds=len(ratios))


def median_ms(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Every contender's median, in milliseconds."""
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def interval(samples: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(samples, k=len(samples))) for _ in range(_RESAMPLES))
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]
