"""How many bytes of values a graph holds at once, at most.

A value is there from the site visit at which it can first be made until the last visit at which something needs it;
what a visit makes and drops counts in full at that visit. Waves are not told apart: a value that waits for a later one
counts as long as the first could need it.
"""

from __future__ import annotations

from collections.abc import Sequence

from polytrace.graph import NodeId
from scheduling.checks import Resolved

_BEFORE = -1  # the time of what depends on no site


def peak_bytes(resolved: Resolved, sizes: Sequence[int]) -> tuple[int, NodeId]:
    """The most bytes held at one visit, and the first node that is made there. `sizes` are bytes, per node."""
    starts: list[int] = []  # the order of the visit, per node
    ends: list[int] = []
    for parts, entry in zip(resolved.operands, resolved.sites, strict=True):
        time = _BEFORE if entry is None else entry[0].order
        for part in parts:
            time = max(time, starts[part])
        for part in parts:
            ends[part] = max(ends[part], time)
        starts.append(time)
        ends.append(time)
    changes: dict[int, int] = {}
    for start, end, size in zip(starts, ends, sizes, strict=True):
        changes[start] = changes.get(start, 0) + size
        changes[end + 1] = changes.get(end + 1, 0) - size
    held = peak = 0
    peak_time = _BEFORE
    for time in sorted(changes):
        held += changes[time]
        if held > peak:
            peak, peak_time = held, time
    return peak, NodeId(starts.index(peak_time) if peak_time in starts else 0)
