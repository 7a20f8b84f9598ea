"""Which invokes run in which waves, how far, and which writes are applied there.

Owns the rule: an invoke runs in a wave iff a read of it belongs to the wave, or a write does and no later wave runs
the invoke. There, all its writes of this and earlier waves are applied, up to the last order that the wave needs. Every
write fires at least once: the invoke's last wave goes on until each has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from polytrace.graph import Carried, Graph, NodeId, Read, Write
from scheduling.checks import Resolved
from scheduling.placement import PURE, Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One invoke in one wave."""

    invoke: int
    wave: int
    until: int  # order of the last visit that the invoke needs in this wave
    reads: tuple[NodeId, ...]  # that belong to this wave
    writes: tuple[NodeId, ...]  # applied in this wave


def find_runs(graph: Graph, resolved: Resolved, live: list[bool], points: list[int], scale: Scale) -> list[Run]:
    """Every run of every invoke, by wave, then invoke."""
    reads: dict[int, dict[int, list[NodeId]]] = {}  # invoke -> wave -> its reads
    writes: dict[int, list[tuple[NodeId, int, int]]] = {}  # invoke -> (node, order, wave)
    period = scale.stages * scale.width
    for node, entry in enumerate(resolved.sites):
        if entry is None or not live[node]:
            continue
        event = graph.nodes[node]
        wave = points[node] // period
        if isinstance(event, Read):
            reads.setdefault(event.invoke, {}).setdefault(wave, []).append(NodeId(node))
        elif isinstance(event, Write):
            writes.setdefault(event.invoke, []).append((NodeId(node), entry[0].order, wave))
    runs = [
        run
        for invoke in reads.keys() | writes.keys()
        for run in _runs_of(invoke, reads.get(invoke, {}), writes.get(invoke, []), resolved)
    ]
    return sorted(runs, key=lambda run: (run.wave, run.invoke))


def _runs_of(
    invoke: int, reads: dict[int, list[NodeId]], writes: list[tuple[NodeId, int, int]], resolved: Resolved
) -> Iterator[Run]:
    final = max((*reads, *[wave for _, _, wave in writes]))
    fired: set[NodeId] = set()
    for wave in sorted({*reads, final}):
        own = reads.get(wave, [])
        until = max([resolved.order(node) for node in own], default=-1)
        if wave == final:
            until = max(until, *[order for node, order, _ in writes if node not in fired], -1)
        applied = tuple([node for node, order, first in writes if first <= wave and order <= until])
        fired.update(applied)
        yield Run(invoke=invoke, wave=wave, until=until, reads=tuple(own), writes=applied)


def executions(
    graph: Graph, live: list[bool], points: list[int], runs: list[Run], scale: Scale
) -> list[tuple[int, int]]:
    """(point, node) of everything that runs but floating nodes, sorted: writes once a run, all others once.

    What earlier steps left is there, and does not run.
    """
    found = [
        (points[node], node)
        for node, is_live in enumerate(live)
        if is_live and points[node] != PURE and not isinstance(graph.nodes[node], (Write, Carried))
    ]
    period = scale.stages * scale.width
    for run in runs:
        found.extend((run.wave * period + points[write] % period, write) for write in run.writes)
    found.sort()
    return found
