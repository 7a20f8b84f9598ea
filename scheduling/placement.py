"""Where and when each node of a graph runs: its point (wave, stage, order).

Owns the rules of waves and stages. A value flows forward within a pass; what is needed at an earlier point opens a
later wave. A read sees every write of its invoke that acts at or before it, so it belongs to the latest of their waves.

Points are packed into one integer that compares like the tuple; `PURE` stands for values that depend on no site and no
parameter (constants, masks and operations on them): they float, and every stage that needs one makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Call, Graph, Op, Parameter, Read, Save, Write
from scheduling.checks import Resolved
from scheduling.plan import PROLOGUE, ValueFacts

PURE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How points are packed: `slot * width + order + 1`, where a slot is `wave * stages + stage`."""

    stages: int
    width: int  # orders of one visit of one stage, the prologue included

    def point(self, wave: int, stage: int, order: int) -> int:
        return (wave * self.stages + stage) * self.width + order + 1

    def wave(self, point: int) -> int:
        return point // (self.width * self.stages)

    def stage(self, point: int) -> int:
        return point // self.width % self.stages

    def order(self, point: int) -> int:
        return point % self.width - 1


def scale_of(description: ModelDescription) -> Scale:
    """The scale that holds every point of a model."""
    last = description.sites[-1].order if description.sites else PROLOGUE
    return Scale(stages=description.stages, width=last + 2)


def find_live(graph: Graph, resolved: Resolved) -> list[bool]:
    """Per node, whether a save or a write needs it (or it is one): writes always count."""
    live = [isinstance(node, (Save, Write)) for node in graph.nodes]
    for node in range(len(live) - 1, -1, -1):
        if live[node]:
            for operand in resolved.operands[node]:
                live[operand] = True
    return live


def place(
    graph: Graph,
    resolved: Resolved,
    live: list[bool],
    facts: tuple[ValueFacts | None, ...],
    scale: Scale,
    earliest: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """The packed point of every live node (PURE for the floating ones), and live nodes after all that they wait for.

    A write's point is in the first wave that has its value; it is applied again in later waves of its invoke. An invoke
    whose turn comes later (`earliest`, a wave for each) has no reads and writes before. Raises GraphError on a cycle.
    """
    forest = _Forest(graph, resolved, live)
    points, finished = _flow(graph, resolved, forest, scale, earliest)
    if len(finished) < forest.num_vertices:
        raise _cycle(graph, forest, finished)
    _run_late(graph, resolved, forest, points, facts, finished, scale)
    return points, [vertex for vertex in finished if vertex < len(graph.nodes)]


class _Forest:
    """Who waits for whom: values, and reads for the writes they see.

    The writes of an invoke, in the order they act, form a chain of links (vertices after the nodes): a link stands for
    all writes up to it, so a read waits for one link however many writes it sees.
    """

    def __init__(self, graph: Graph, resolved: Resolved, live: list[bool]) -> None:
        self.num_nodes = len(graph.nodes)
        self.followers: list[list[int]] = [[] for _ in range(self.num_nodes)]
        self.waiting = [0] * self.num_nodes
        self.live = live
        effects: dict[int, list[tuple[int, int]]] = {}  # invoke -> (order, node) of its reads and writes
        for node, is_live in enumerate(live):
            if not is_live:
                continue
            for operand in resolved.operands[node]:
                self.followers[operand].append(node)
            self.waiting[node] = len(resolved.operands[node])
            entry = resolved.sites[node]
            if entry is not None:
                effects.setdefault(graph.nodes[node].invoke, []).append((entry[0].order, node))  # type: ignore[union-attr]
        for events in effects.values():
            self._chain(graph, sorted(events))
        self.num_vertices = sum(live) + len(self.followers) - self.num_nodes

    def _chain(self, graph: Graph, events: list[tuple[int, int]]) -> None:
        last: int | None = None
        for _, node in events:
            if isinstance(graph.nodes[node], Write):
                link = len(self.followers)
                self.followers.append([])
                self.waiting.append(0)
                self._wait(link, node)
                if last is not None:
                    self._wait(link, last)
                last = link
            elif last is not None:
                self._wait(node, last)

    def _wait(self, vertex: int, other: int) -> None:
        self.followers[other].append(vertex)
        self.waiting[vertex] += 1


def _flow(
    graph: Graph, resolved: Resolved, forest: _Forest, scale: Scale, earliest: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Points in topological order, and that order. Links and writes hand on a wave, all others a point."""
    nodes = graph.nodes
    points = [PURE] * len(forest.followers)
    waiting = forest.waiting.copy()
    is_node_live = forest.live
    ready = [
        vertex for vertex, count in enumerate(waiting) if not count and (vertex >= len(nodes) or is_node_live[vertex])
    ]
    finished: list[int] = []
    while ready:
        vertex = ready.pop()
        finished.append(vertex)
        handed_on = points[vertex]
        if vertex < len(nodes):
            node = nodes[vertex]
            if earliest is not None and isinstance(node, (Read, Write)) and earliest[node.invoke]:
                handed_on = max(handed_on, _begin(node, earliest[node.invoke], scale))
            points[vertex] = _point(graph, resolved, vertex, handed_on, scale)
            handed_on = points[vertex]
            if isinstance(nodes[vertex], Write):
                handed_on = scale.wave(handed_on)
        for follower in forest.followers[vertex]:
            if handed_on > points[follower]:
                points[follower] = handed_on
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return points, finished


def _begin(node: Read | Write, wave: int, scale: Scale) -> int:
    """What a node may need at the latest to be in the wave: a read needs a wave, a write a point."""
    return wave if isinstance(node, Read) else scale.point(wave, 0, PROLOGUE)


def _point(graph: Graph, resolved: Resolved, vertex: int, needs: int, scale: Scale) -> int:
    """The node's point, from the latest that it needs (for a read: the wave of the writes it sees)."""
    node = graph.nodes[vertex]
    if isinstance(node, Op):
        return needs
    entry = resolved.sites[vertex]
    if entry is not None:
        info = entry[0]
        if isinstance(node, Read):
            return scale.point(max(needs, 0), info.stage, info.order)
        return _first_at_or_after(needs, info.stage, info.order, scale)
    if isinstance(node, Call):
        home = resolved.homes[vertex]
        if needs != PURE and scale.stage(needs) == home:
            return needs
        return _first_at_or_after(needs, home, PROLOGUE, scale)
    if isinstance(node, Parameter):
        return scale.point(0, resolved.homes[vertex], PROLOGUE)
    if isinstance(node, Save):
        return max(needs, scale.point(0, 0, PROLOGUE))
    return PURE


def _first_at_or_after(needs: int, stage: int, order: int, scale: Scale) -> int:
    """The first point of a stage's order that is not before `needs`."""
    if needs == PURE:
        return scale.point(0, stage, order)
    same_wave = scale.point(scale.wave(needs), stage, order)
    return same_wave if needs <= same_wave else same_wave + scale.stages * scale.width


def _run_late(
    graph: Graph,
    resolved: Resolved,
    forest: _Forest,
    points: list[int],
    facts: tuple[ValueFacts | None, ...],
    finished: list[int],
    scale: Scale,
) -> None:
    """What grows runs late: it is cheaper to carry and hold its operands.

    An operation whose result is larger than its operands, and whose users all run in later slots, moves to the first of
    them. A parameter is gathered in the first wave that uses it.
    """
    for vertex in reversed(finished):
        if vertex >= len(graph.nodes) or points[vertex] == PURE:
            continue
        node = graph.nodes[vertex]
        if not isinstance(node, (Op, Parameter)):
            continue
        slot = min(points[follower] for follower in forest.followers[vertex]) // scale.width
        if isinstance(node, Parameter):
            home = resolved.homes[vertex]
            wave = slot // scale.stages - (slot % scale.stages < home)
            points[vertex] = scale.point(wave, home, PROLOGUE)
        elif slot > points[vertex] // scale.width and _grows(vertex, resolved, points, facts):
            points[vertex] = slot * scale.width


def _grows(vertex: int, resolved: Resolved, points: list[int], facts: tuple[ValueFacts | None, ...]) -> bool:
    """Whether a value is known to be larger than what it is made of (floating operands are free)."""
    own = facts[vertex]
    parts = [facts[operand] for operand in resolved.operands[vertex] if points[operand] != PURE]
    if own is None or any(part is None for part in parts):
        return False
    return own.num_bytes > sum(part.num_bytes for part in parts if part is not None)


def _cycle(graph: Graph, forest: _Forest, finished: list[int]) -> GraphError:
    """The error that names a write and the read of it that it depends on."""
    done = set(finished)
    awaited: dict[int, int] = {}  # vertex -> one that it waits for, both unfinished
    for vertex, followers in enumerate(forest.followers):
        if vertex not in done and (vertex >= len(graph.nodes) or forest.live[vertex]):
            for follower in followers:
                awaited[follower] = vertex
    vertex = next(vertex for vertex in awaited if vertex not in done)
    path: dict[int, None] = {}
    while vertex not in path:
        path[vertex] = None
        vertex = awaited[vertex]
    ring = list(path)[list(path).index(vertex) :]
    # Backwards along the ring: a read waits, over links, for a write, which waits for values, down to the read again.
    while not (ring[0] < len(graph.nodes) and isinstance(graph.nodes[ring[0]], Read)):
        ring = [*ring[1:], ring[0]]
    read = graph.nodes[ring[0]]
    write = next(node for v in ring[1:] if v < len(graph.nodes) and isinstance(node := graph.nodes[v], Write))
    assert isinstance(read, Read)
    return GraphError(
        f"a cycle: the write to {write.site} ({write.where}) depends on the read of {read.site} ({read.where}), "
        f"and that read sees this write, which acts earlier in the model",
        where=write.where,
    )
