"""Splits a wave that has more rows than one pass takes into several, so that a sweep may be of any size.

Owns which invokes wait for a later wave. Those whose values other invokes need stay; the others go in order, as many to
a wave as fit. What the parts have in common (the rows that all fork from) runs again in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polytrace.graph import Graph, Read, Write
from scheduling.checks import Resolved
from scheduling.forest import Forest
from scheduling.plan import Segment
from scheduling.waves import Run


def later_invokes(
    wave: int,
    runs: Sequence[Run],
    forest: Forest,
    sequences: Sequence[int],
    sources: set[int],
    budget_tokens: int,
) -> dict[int, int]:
    """The invokes of a wave that have to wait, and the wave that each waits for; empty when nobody can.

    `forest` has the wave's sequences, in the order of `runs`; `sequences` says how many each run has. `sources` are
    invokes whose values others need.
    """
    started = {run.invoke for run in runs if run.wave < wave}
    widths = [_width(segment) for segment in forest.segments]
    room = max(1, budget_tokens - max(widths, default=0))  # every part runs what its forks have in common
    waits: dict[int, int] = {}
    part, taken, place = 0, 0, 0
    seen: set[int] = set()  # segments that the part has
    for run, count in zip((run for run in runs if run.wave == wave), sequences, strict=True):
        own = set(forest.places[place : place + count])
        place += count
        is_bound = run.invoke in sources or run.invoke in started
        cost = sum(widths[segment] for segment in own - seen)
        if not is_bound and taken and taken + cost > room:
            part, taken, seen = part + 1, 0, set()
            cost = sum(widths[segment] for segment in own)
        seen |= own
        taken += cost
        if part and not is_bound:
            waits[run.invoke] = wave + part
    return waits


def find_ancestors(runs: Sequence[Run], forest: Forest, sequences: Sequence[int], waits: Mapping[int, int]) -> set[int]:
    """The invokes of a wave that those which wait would fork from if they ran in it."""
    owners: dict[int, int] = {}  # segment -> the first invoke that has it
    waiting: set[int] = set()
    place = 0
    for run, count in zip(runs, sequences, strict=True):
        for segment in forest.places[place : place + count]:
            owners.setdefault(segment, run.invoke)
            if run.invoke in waits:
                waiting.add(segment)
        place += count
    parents = {forest.segments[segment].parent for segment in waiting} - {None}
    return {owners[parent] for parent in parents if parent is not None}


def find_sources(graph: Graph, resolved: Resolved, finished: Sequence[int]) -> set[int]:
    """The invokes whose values go into writes of others."""
    none: frozenset[int] = frozenset()
    origin: list[frozenset[int]] = [none] * len(graph.nodes)
    sources: set[int] = set()
    for node in sorted(finished):
        event = graph.nodes[node]
        if isinstance(event, Read):
            origin[node] = frozenset((event.invoke,))
            continue
        parts = {origin[operand] for operand in resolved.operands[node]} - {none}
        if parts:
            origin[node] = parts.pop() if len(parts) == 1 else frozenset().union(*parts)
        if isinstance(event, Write):
            sources.update(origin[node] - {event.invoke})
    return sources


def _width(segment: Segment) -> int:
    """Own rows of a segment at its widest layer."""
    return max((stop - start for start, stop in zip(segment.starts, segment.stops, strict=False)), default=0)
