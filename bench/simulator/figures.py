"""What a run shows, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.load.figures import percentiles
from bench.simulator.population import STANDING, kind_of
from bench.simulator.simulation import Ended, Run

_WINDOWS = 24  # of equal length, in which what backlogged tenants received is held against what was due to them


def figures(run: Run) -> dict[str, Any]:
    """Of one policy. Seconds are simulated ones; latencies in milliseconds, as of `bench.load`."""
    done = [one for one in run.ended if one.error is None]
    books = run.books
    backlogged_s = _until_two_wait(run.ended)
    return {
        "requests": len(run.ended),
        "done": len(done),
        "seconds": run.seconds,
        "requests_per_s": len(done) / run.seconds,
        "token_layers_per_s": sum(one.token_layers for one in done) / run.seconds,
        "alone / shared": sum(one.token_layers_alone for one in done) / sum(one.token_layers for one in done),
        "passes": run.passes,
        "requests_per_pass": run.members / run.passes,
        "tenants_per_pass": run.tenants / run.passes,
        "rows_per_pass": run.rows / run.passes,
        "occupancy_by_stage": [round(busy / run.seconds, 3) for busy in run.busy_s],
        "largest_pass": books.largest_pass,
        "gap / largest_pass": books.largest_gap / books.largest_pass,
        "most_backlogged": books.most_backlogged,
        "backlogged_s": backlogged_s,
        "received / due": received_of_due(run, backlogged_s),
        "latency_ms": {kind: percentiles(latencies) for kind, latencies in _latencies(done).items()},
    }


def by_name(run: Run) -> dict[str, list[Ended]]:
    """What became of each class of tenants' requests."""
    found: dict[str, list[Ended]] = {}
    for one in run.ended:
        found.setdefault(kind_of(one.asked.tenant), []).append(one)
    return found


def received_of_due(run: Run, until: float) -> dict[str, dict[str, float]]:
    """Of the tenants that are backlogged from the start, in windows until the first of them is not: what each received
    of an equal part of what they received together. The least, the median and the most of any window.
    """
    times, lines = np.array(run.books.times), np.array(run.books.lines)
    if until <= 0 or not len(times):
        return {}
    ends = np.searchsorted(times, np.linspace(0.0, until, _WINDOWS + 1)[1:], side="right") - 1
    served = np.diff(lines[np.unique(ends[ends >= 0])], axis=0, prepend=0.0)
    due = served.mean(axis=1, keepdims=True)
    shares = served[due[:, 0] > 0] / due[due[:, 0] > 0]
    return {
        tenant: {"least": float(own.min()), "median": float(np.median(own)), "most": float(own.max())}
        for tenant, own in zip(run.books.watched, shares.T, strict=True)
    }


def _until_two_wait(ended: Sequence[Ended]) -> float:
    """When the first of the tenants that are backlogged from the start had its last request begun."""
    starts: dict[str, float] = {}
    for one in ended:
        if one.asked.tenant in STANDING:
            starts[one.asked.tenant] = max(starts.get(one.asked.tenant, 0.0), one.started)
    return min(starts.values(), default=0.0)


def _latencies(done: Sequence[Ended]) -> Mapping[str, list[float]]:
    """By class of tenants, generations of those who wait for them apart: each takes as many passes as tokens."""
    found: dict[str, list[float]] = {}
    for one in done:
        kind = kind_of(one.asked.tenant)
        if one.asked.experiment == "generation":
            kind = "generation"
        found.setdefault(kind, []).append(one.ended - one.asked.at)
    return dict(sorted(found.items()))
