"""Where and when each node of a graph runs: its point (wave, stage, order).

Owns the rules of waves and stages. A value flows forward within a pass; what is needed at an earlier point opens a
later wave. A read sees every write of its invoke that acts at or before it, so it belongs to the latest of their waves.

A wave that runs another one backwards has points too: its stages and orders are passed in the opposite direction, so a
point compares with all others as it happens, and everything that looks at points alone holds for gradients as well.

Points are packed into one integer that compares like the tuple; `PURE` stands for values that depend on no site and no
parameter (constants, masks and operations on them): they float, and every stage that needs one makes its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from polytrace.description import ModelDescription, SiteInfo
from polytrace.errors import GraphError
from polytrace.graph import (
    Call,
    Carried,
    GradWrite,
    Graph,
    Last,
    Node,
    Op,
    OpGrad,
    Parameter,
    Port,
    Read,
    Save,
    SeedGrad,
    SiteGrad,
    Stop,
    Write,
)
from scheduling.checks import Resolved
from scheduling.plan import PROLOGUE, ValueFacts

PURE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How points are packed: `slot * width + place`, where slots and places count what happens one after another.

    A wave has a slot for each stage: the first is of stage 0 where it runs forwards, of the last stage where it runs
    backwards. A slot has the prologue at place 0, then a place for each order, ascending or descending.
    """

    stages: int
    width: int  # orders of one visit of one stage, the prologue included
    of: list[int | None] = field(default_factory=list)  # per wave: which one it runs backwards; behind the end: none

    def runs_back(self, wave: int) -> int | None:
        """Which wave it runs backwards; None: it runs forwards."""
        return self.of[wave] if wave < len(self.of) else None

    def is_backward(self, wave: int) -> bool:
        return self.runs_back(wave) is not None

    def slot(self, wave: int, stage: int) -> int:
        return wave * self.stages + (self.stages - 1 - stage if self.is_backward(wave) else stage)

    def point(self, wave: int, stage: int, order: int) -> int:
        place = self.width - 1 - order if order != PROLOGUE and self.is_backward(wave) else order + 1
        return self.slot(wave, stage) * self.width + place

    def wave(self, point: int) -> int:
        return point // (self.width * self.stages)

    def stage(self, point: int) -> int:
        place = point // self.width % self.stages
        return self.stages - 1 - place if self.is_backward(self.wave(point)) else place

    def order(self, point: int) -> int:
        place = point % self.width
        return self.width - 1 - place if place and self.is_backward(self.wave(point)) else place - 1

    def next_forward(self, wave: int) -> int:
        """The first wave at or behind one that does not run backwards."""
        while self.is_backward(wave):
            wave += 1
        return wave


def scale_of(description: ModelDescription) -> Scale:
    """The scale that holds every point of a model."""
    last = description.sites[-1].order if description.sites else PROLOGUE
    return Scale(stages=description.stages, width=last + 2)


def find_live(graph: Graph, resolved: Resolved, holds: Collection[int] = ()) -> list[bool]:
    """Per node, whether a save or a write needs it, or it is one: writes always count, and tokens, and what is held."""
    live = [isinstance(node, _EFFECTS) or is_token(node) for node in graph.nodes]
    for node in holds:
        live[node] = True
    for node in range(len(live) - 1, -1, -1):
        if live[node]:
            for operand in resolved.operands[node]:
                live[operand] = True
    return live


_EFFECTS = (Save, Write, Stop, GradWrite, SiteGrad)


def is_token(node: Node) -> bool:
    """Whether it reads what sequences go on with: that is drawn whoever wants it."""
    return isinstance(node, Read) and node.site.port is Port.TOKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Who waits for whom. A read waits for all writes of its invoke that act before it."""

    nodes: list[int]  # the live ones, each after all that it waits for
    writes: Mapping[int, list[int]]  # invoke -> its live writes in the order they act
    seen: list[int]  # per node, for live reads: how many of these act before


def find_order(graph: Graph, resolved: Resolved, live: list[bool]) -> Order:
    """An order in which the live nodes can run. Raises GraphError on a cycle."""
    ordering = Ordering(graph, resolved, live)
    for node, is_live in enumerate(live):
        if is_live:
            ordering.reach(node)
    return ordering.order


class Ordering:
    """Puts live nodes in an order in which they can run, as far as somebody wants to reach."""

    def __init__(self, graph: Graph, resolved: Resolved, live: list[bool]) -> None:
        writes, seen = _find_effects(graph, resolved, live)
        self.order = Order(nodes=[], writes=writes, seen=seen)
        self._graph, self._operands = graph, resolved.operands
        self._is_begun, self._is_done = bytearray(len(live)), bytearray(len(live))
        self._num_done = dict.fromkeys(writes, 0)  # invoke -> how many of its writes, from the first on, are done

    def reach(self, start: int) -> None:
        """Puts a node behind the others, behind all that it waits for. Raises GraphError on a cycle."""
        nodes, operands, writes, seen = self._graph.nodes, self._operands, self.order.writes, self.order.seen
        is_begun, is_done = self._is_begun, self._is_done
        pending = [start]
        while pending:
            node = pending[-1]
            if is_done[node]:
                pending.pop()
                continue
            waits: Sequence[int] = ()
            if not is_begun[node]:
                waits = [operand for operand in operands[node] if not is_done[operand]]
            if seen[node]:
                waits = _unfinished(writes, nodes[node].invoke, seen[node], self._num_done, is_done)  # type: ignore[union-attr]
            is_begun[node] = True
            if not waits:
                is_done[node] = True
                self.order.nodes.append(node)
                pending.pop()
            for other in waits:
                if is_begun[other]:
                    raise _cycle(self._graph, [vertex for vertex in pending if is_begun[vertex]], other)
                pending.append(other)


def _find_effects(graph: Graph, resolved: Resolved, live: list[bool]) -> tuple[dict[int, list[int]], list[int]]:
    """`Order.writes` and `Order.seen`."""
    effects: dict[int, list[tuple[int, int]]] = {}  # invoke -> (order, node) of its reads and writes
    for node, entry in enumerate(resolved.sites):
        if entry is not None and live[node]:
            effects.setdefault(graph.nodes[node].invoke, []).append((entry[0].order, node))  # type: ignore[union-attr]
    writes: dict[int, list[int]] = {}
    seen = [0] * len(live)
    for invoke, events in effects.items():
        own = writes[invoke] = []
        for _, node in sorted(events):
            if isinstance(graph.nodes[node], Write):
                own.append(node)
            else:
                seen[node] = len(own)
    return writes, seen


def _unfinished(
    writes: Mapping[int, list[int]], invoke: int, seen: int, num_done: dict[int, int], is_done: bytearray
) -> list[int]:
    """The first of the writes seen that is not done, if there is one."""
    own, done = writes[invoke], num_done[invoke]
    while done < seen and is_done[own[done]]:
        done += 1
    num_done[invoke] = done
    return own[done : done + 1] if done < seen else []


def _cycle(graph: Graph, path: list[int], again: int) -> GraphError:
    """The error that names a write and the read of it that it depends on, both on a path that comes to a node again."""
    last = dict.fromkeys(reversed(path))  # each where it was begun: it may have been asked for before
    ring = [*reversed(last)][[*reversed(last)].index(again) :]
    while not isinstance(read := graph.nodes[ring[0]], Read):  # only reads wait for later nodes: there is one
        ring = [*ring[1:], ring[0]]
    write = graph.nodes[ring[1]]
    assert isinstance(write, Write)
    told = f"a cycle: the write to {write.site} ({write.where}) depends on the read of"
    if read.site.port is Port.TOKEN:
        drawn = f"{told} the token that the same step draws ({read.where}), which comes behind the whole model"
        return GraphError(f"{drawn}: use it at the next step, `for step in tracer.iter[...]:`", where=write.where)
    return GraphError(
        f"{told} {read.site} ({read.where}), and that read sees this write, which acts earlier in the model: read the "
        f"value in an invoke of its own, `with tracer.invoke(prompt):`",
        where=write.where,
    )


def place(
    graph: Graph,
    resolved: Resolved,
    order: Order,
    facts: tuple[ValueFacts | None, ...],
    scale: Scale,
    earliest: Sequence[int] | None = None,
    holds: Collection[int] = (),
) -> list[int]:
    """The packed point of every live node; PURE for the floating ones and those that are not live.

    A write's point is in the first wave that has its value; it is applied again in later waves of its invoke. An invoke
    whose turn comes later (`earliest`, a wave for each) has no reads and writes before.
    """
    points = _earliest_points(graph, resolved, order, scale, earliest)
    _run_late(graph, resolved, order, points, facts, scale)
    for node in holds:
        if points[node] == PURE:  # somebody has to have it when the program is over
            points[node] = scale.point(0, 0, PROLOGUE)
    return points


def _earliest_points(
    graph: Graph, resolved: Resolved, order: Order, scale: Scale, earliest: Sequence[int] | None
) -> list[int]:
    placer = Placer(graph, resolved, order, scale, earliest)
    for node in order.nodes:
        placer.put(node)
    return placer.points


class Placer:
    """Gives nodes the earliest points that they can have, one after another, each behind all that it waits for."""

    def __init__(
        self, graph: Graph, resolved: Resolved, order: Order, scale: Scale, earliest: Sequence[int] | None = None
    ) -> None:
        self.points = [PURE] * len(graph.nodes)
        self._graph, self._resolved, self._order, self._scale = graph, resolved, order, scale
        self._earliest = earliest
        self._reached: dict[int, list[int]] = {
            invoke: [0] for invoke in order.writes
        }  # wave that its first 0, 1, ... need

    def put(self, node: int) -> None:
        """Gives the next node in the order its point."""
        event, points, order, scale = self._graph.nodes[node], self.points, self._order, self._scale
        needs = PURE
        for operand in self._resolved.operands[node]:
            if points[operand] > needs:
                needs = points[operand]
        if isinstance(event, (Op, Last)):
            points[node] = needs
            return
        if isinstance(event, Read):
            waves = self._reached[event.invoke]
            for write in order.writes[event.invoke][len(waves) - 1 : order.seen[node]]:
                waves.append(max(waves[-1], scale.wave(points[write])))
            needs = waves[order.seen[node]]
        earliest = self._earliest
        if earliest is not None and isinstance(event, (Read, Write)) and earliest[event.invoke]:
            needs = max(needs, _begin(event, earliest[event.invoke], scale))
        points[node] = _point(self._graph, self._resolved, node, needs, scale)


def _begin(node: Read | Write, wave: int, scale: Scale) -> int:
    """What a node may need at the latest to be in the wave: a read needs a wave, a write a point."""
    return wave if isinstance(node, Read) else scale.point(wave, 0, PROLOGUE)


def _point(graph: Graph, resolved: Resolved, vertex: int, needs: int, scale: Scale) -> int:
    """The node's point, from the latest that it needs (for a read: the wave of the writes it sees)."""
    node = graph.nodes[vertex]
    if isinstance(node, (Op, Last, SeedGrad)):
        return needs
    if isinstance(node, SiteGrad):
        info = _site_of(resolved, node.at)
        stage, place = (info.stage, info.order) if node.first is None else node.first[1:]
        return scale.point(node.wave, stage, place)
    if isinstance(node, OpGrad) and not isinstance(graph.nodes[node.op], Call):
        return needs
    if isinstance(node, Carried):
        return scale.point(0, 0, PROLOGUE)  # wherever it is, it comes before anything runs
    entry = resolved.sites[vertex]
    if entry is not None:
        info = entry[0]
        if isinstance(node, Read):
            return scale.point(scale.next_forward(max(needs, 0)), info.stage, info.order)
        return _first_at_or_after(needs, info.stage, info.order, scale)
    if isinstance(node, (Call, OpGrad)):
        return call_point(needs, resolved.homes[vertex if isinstance(node, Call) else node.op], scale)
    if isinstance(node, Parameter):
        return scale.point(0, resolved.homes[vertex], PROLOGUE)
    if isinstance(node, (Save, Stop)):
        return max(needs, scale.point(0, 0, PROLOGUE))
    return PURE


def call_point(needs: int, home: int, scale: Scale) -> int:
    """The point of a module's call on a value, at the stage that has the module."""
    if needs != PURE and scale.stage(needs) == home:
        return needs
    return _first_at_or_after(needs, home, PROLOGUE, scale)


def _first_at_or_after(needs: int, stage: int, order: int, scale: Scale) -> int:
    """The first point of a stage's order that is not before `needs`."""
    if needs == PURE:
        return scale.point(0, stage, order)
    wave = scale.wave(needs)
    same_wave = scale.point(wave, stage, order)
    if needs <= same_wave and (order == PROLOGUE or not scale.is_backward(wave)):
        return same_wave
    return scale.point(wave + 1 if order == PROLOGUE else scale.next_forward(wave + 1), stage, order)


def _site_of(resolved: Resolved, node: int) -> SiteInfo:
    entry = resolved.sites[node]
    assert entry is not None, "it reads or writes a site"
    return entry[0]


def _run_late(
    graph: Graph,
    resolved: Resolved,
    order: Order,
    points: list[int],
    facts: tuple[ValueFacts | None, ...],
    scale: Scale,
) -> None:
    """What grows runs late: it is cheaper to carry and hold its operands.

    An operation whose result is larger than its operands, and whose users all run in later slots, moves to the first of
    them. A parameter is gathered in the first wave that uses it.
    """
    never = max(points, default=0) + 1
    first_uses = [never] * len(points)
    for node in reversed(order.nodes):
        event = graph.nodes[node]
        if points[node] != PURE and isinstance(event, (Op, Parameter)):
            slot = first_uses[node] // scale.width
            if isinstance(event, Parameter):
                home, wave = resolved.homes[node], slot // scale.stages
                points[node] = scale.point(wave - (scale.slot(wave, home) > slot), home, PROLOGUE)
            elif slot > points[node] // scale.width and _grows(node, resolved, points, facts):
                points[node] = slot * scale.width
        point = points[node]
        for operand in resolved.operands[node]:
            if point < first_uses[operand]:
                first_uses[operand] = point


def _grows(vertex: int, resolved: Resolved, points: list[int], facts: tuple[ValueFacts | None, ...]) -> bool:
    """Whether a value is known to be larger than what it is made of (floating operands are free)."""
    own = facts[vertex]
    parts = [facts[operand] for operand in resolved.operands[vertex] if points[operand] != PURE]
    if own is None or any(part is None for part in parts):
        return False
    return own.num_bytes > sum(part.num_bytes for part in parts if part is not None)
