"""A graph with gradients as one without: what `scheduling.program` plans like any other.

`scheduling.backwards` makes the nodes. Here they get their places among the user's own, and it is said at which visits
of which waves gradients stop, and until when a wave's way back is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from polytrace.errors import GraphError
from polytrace.graph import (
    Backward,
    Grad,
    GradWrite,
    Graph,
    Node,
    NodeId,
    OpGrad,
    Read,
    Ref,
    Request,
    SiteGrad,
    Write,
    operands,
)
from polytrace.pruning import moved
from scheduling.backwards import Backwards
from scheduling.checks import ModelTable, Resolved, resolve_nodes
from scheduling.columns import Change, Columns
from scheduling.levels import Levels
from scheduling.placement import PURE, Scale
from scheduling.plan import ValueFacts
from scheduling.waves import Run


def has_gradients(graph: Graph) -> bool:
    """Whether somebody asks for gradients."""
    return any(isinstance(node, Backward) for node in graph.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """A graph whose gradients are nodes. All that is said of nodes is said of the new ones."""

    request: Request
    resolved: Resolved
    live: list[bool]
    columns: Columns
    points: list[int]
    earliest: Sequence[int] | None  # per invoke, the first wave that it has anything in; None: nothing is said
    cuts: Mapping[int, tuple[int, ...]]  # wave that is run backwards -> orders of the visits where its gradient stops
    frees: Mapping[int, tuple[int, ...]]  # wave that runs backwards -> waves that no later one does


def expand(request: Request, resolved: Resolved, columns: Columns, table: ModelTable, scale: Scale) -> Expanded:
    """Replaces backwards and gradients by what makes them; says in `scale.of` which waves run backwards.

    `columns` has the request's graph and facts. Raises GraphError with the user's line.
    """
    found = _expand(request, resolved, columns, table, scale, None)
    begins = _find_begins(found, scale)
    if not any(begins):
        return found
    scale.of.clear()
    return _expand(request, resolved, columns, table, scale, begins)


def _expand(
    request: Request,
    resolved: Resolved,
    columns: Columns,
    table: ModelTable,
    scale: Scale,
    earliest: Sequence[int] | None,
) -> Expanded:
    graph = columns.graph
    work = Backwards(graph, resolved, columns.facts, scale, earliest, table)
    for node, event in enumerate(graph.nodes):
        if isinstance(event, Backward) and work.live[node]:
            work.run_back(NodeId(node), event)
    for node, event in enumerate(graph.nodes):
        if work.live[node] and not isinstance(event, (Backward, GradWrite)):
            work.reach(node)
    return _finished(work, request, columns, table, scale)


def _find_begins(found: Expanded, scale: Scale) -> list[int]:
    """Per invoke, the wave before which nobody needs any of it: that of its first write, if reads are used later only.

    A step of a learning loop reads where it writes what the step before has learnt, and need not run before that.
    """
    nodes, points = found.request.graph.nodes, found.points
    never = 1 + max((scale.wave(point) for point in points), default=0)
    uses = [never] * len(nodes)
    for node, point in enumerate(points):
        wave = scale.wave(point) if point != PURE else never
        for part in found.resolved.operands[node]:
            uses[part] = min(uses[part], wave)
    writes, reads = [never] * len(found.request.invokes), [never] * len(found.request.invokes)
    for node, event in enumerate(nodes):
        if isinstance(event, Write):
            writes[event.invoke] = min(writes[event.invoke], scale.wave(points[node]))
        elif isinstance(event, Read):
            reads[event.invoke] = min(reads[event.invoke], scale.next_forward(uses[node]))
    return [write if write <= read and write < never else 0 for write, read in zip(writes, reads, strict=True)]


def cuts_of(
    cuts: Mapping[int, tuple[int, ...]], wave: int, runs: Sequence[Run], resolved: Resolved, levels: Levels
) -> tuple[int, ...]:
    """The orders at which a wave's gradient stops: those where somebody takes a turn, and behind the first of these
    where anything is written, and every layer's input.

    What stops inside of a layer goes on by itself, beside what came around it; at the layer's input both are added up.
    So each layer is run back once, and where a stage begins makes no difference.
    """
    own = cuts.get(wave, ())
    if not own:
        return ()
    written = {resolved.order(write) for run in runs if run.wave == wave for write in run.writes}
    until = max(run.until for run in runs if run.wave == wave)
    return tuple(sorted({*own, *[order for order in (*written, *levels.inputs) if own[0] < order <= until]}))


def _finished(work: Backwards, request: Request, columns: Columns, table: ModelTable, scale: Scale) -> Expanded:
    """The graph with its new nodes, in an order in which operands come first and the user's lines stay in turn."""
    aliases = work.found
    places: dict[NodeId, NodeId] = {}
    nodes: list[Node] = []
    for old in _in_turn(work):
        places[NodeId(old)] = NodeId(len(nodes))
        nodes.append(work.nodes[old])
    for grad, value in aliases.items():
        places[NodeId(grad)] = places[value.node]
    graph = Graph(nodes=tuple([moved(node, places) for node in nodes]))
    expanded = replace(request, graph=graph)
    facts: list[ValueFacts | None] = [None] * len(nodes)
    points = [PURE] * len(nodes)
    for old, new in places.items():
        if old not in aliases:
            facts[new], points[new] = work.facts[old], work.points[old]
    own = Columns(
        narrowed={places[node]: found for node, found in columns.narrowed.items() if node in places},
        changed={
            places[node]: Change(places[change.base], change.parts)
            for node, change in columns.changed.items()
            if node in places
        },
        graph=graph,
        facts=tuple(facts),
    )
    cuts: dict[int, set[int]] = {wave: set() for wave in work.last_uses}
    for back, order, _ in work.visits:
        of = scale.runs_back(back)
        assert of is not None
        cuts[of].add(order)
    frees: dict[int, list[int]] = {}
    for wave, back in work.last_uses.items():
        frees.setdefault(back, []).append(wave)
    return Expanded(
        request=expanded,
        resolved=resolve_nodes(expanded, table),
        live=[True] * len(nodes),
        columns=own,
        points=points,
        earliest=work.earliest,
        cuts={wave: tuple(sorted(orders)) for wave, orders in cuts.items()},
        frees={back: tuple(sorted(waves)) for back, waves in frees.items()},
    )


def _in_turn(work: Backwards) -> Iterator[int]:
    """The live nodes, each behind its operands: the user's own in their order, made ones as early as they can be.

    Raises GraphError where the user's order cannot be kept.
    """
    follows: dict[int, list[int]] = {}  # turns -> those of their visit that come next
    waits: dict[int, int] = {}
    kept = [
        node
        for node, event in enumerate(work.nodes)
        if work.live[node] and not isinstance(event, (Backward, Grad, GradWrite))
    ]
    for node in kept:
        parts = {work.found.get(part, Ref(part)).node for part in operands(work.nodes[node])}
        if isinstance(event := work.nodes[node], SiteGrad):
            parts.add(event.at)
        elif isinstance(event, OpGrad):
            parts.add(event.op)
        waits[node] = len(parts)
        for part in parts:
            follows.setdefault(part, []).append(node)
    for turns in work.visits.values():
        ordered = [entry[-1] for entry in sorted(turns)]
        for before, behind in pairwise(ordered):
            follows.setdefault(before, []).append(behind)
            waits[behind] += 1
    ready = [(node < work.num_own, node) for node in kept if not waits[node]]
    heapq.heapify(ready)
    last: dict[object, NodeId] = {}  # by site and invoke: the last of its reads and writes
    while ready:
        _, node = heapq.heappop(ready)
        event = work.nodes[node]
        if isinstance(event, (Read, Write)):
            key = event.site, event.invoke
            if last.get(key, NodeId(-1)) > node:
                told = "this acts before a gradient's line that has to come first: move the gradient's edit up"
                raise GraphError(told, where=event.where)
            last[key] = NodeId(node)
        yield node
        for after in follows.get(node, ()):
            waits[after] -= 1
            if not waits[after]:
                heapq.heappush(ready, (after < work.num_own, after))
