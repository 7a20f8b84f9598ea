"""Reverse mode over a graph: the nodes that a user's backwards become before anything is placed.

A gradient is nodes like any others. For each `Backward` the path is found from the loss back to the values whose
gradients are asked for, through the user's own nodes and through the model: a read sees the writes of its invoke that
act before it. Along the path, later things first, each value's gradient is the sum of what its users give:

- an op or a call gives what `OpGrad` makes of the gradient of its result;
- a write gives what arrived in the model where it wrote (`Turn.TAKE`), and stops it there;
- a read hands its gradient to the model (`Turn.ADD`), and its own total is what arrives there (`Turn.LOOK`).

The turns stand in waves that run the wave of the read backwards, appended behind all waves so far, later ones first. A
gradient enters the run of its own wave, and a write that is applied in several waves takes its gradient from each: so
nothing depends on how prompts came to be run more than once.

Reverse mode as a transformation of a program's source is old (Griewank and Walther, Evaluating Derivatives, 2008);
that the model is one more operation, run backwards by those who have it, is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from polytrace.errors import GraphError
from polytrace.graph import (
    Backward,
    Call,
    Grad,
    GradWrite,
    Graph,
    Node,
    NodeId,
    Op,
    OpGrad,
    Parameter,
    Read,
    Ref,
    SeedGrad,
    Site,
    SiteGrad,
    Turn,
    Write,
    operands,
)
from scheduling.checks import ModelTable, Resolved
from scheduling.columns import Facts
from scheduling.placement import PURE, Ordering, Placer, Scale, call_point, find_live
from scheduling.plan import NOWHERE

_FLOATING = ("float", "bfloat", "complex")
_STOPS = frozenset({"detach"})  # ops that hand on values and no gradients
_RANKS = {Turn.ADD: 0, Turn.LOOK: 1, Turn.SET: 2}  # of reads that see the same, as the turns go


@dataclass(slots=True)
class _Path:
    """What lies between the loss of one backward and the values whose gradients are asked for."""

    nodes: set[int]  # that the loss depends on and that depend on one of these
    reads: list[int]  # of these, the reads, in an order in which they can run
    first: dict[int, int]  # invoke -> the first order at which its gradient matters to anybody


class Place(NamedTuple):
    """Where a gradient is seen."""

    stage: int
    order: int
    site: Site | None  # None: the read's own


@dataclass(slots=True, kw_only=True)
class _Sweep:
    """One backward on its way."""

    event: Backward
    wanted: dict[int, list[int]] = field(default_factory=dict)  # values -> the Grad nodes that ask for theirs
    given: dict[int, int] = field(default_factory=dict)  # values -> the last GradWrite to theirs
    parts: dict[int, list[Ref]] = field(default_factory=dict)  # values -> what their users give
    members: dict[int, dict[int, list[Ref]]] = field(default_factory=dict)  # of ops of several results: by result
    waves: dict[int, int] = field(default_factory=dict)  # wave -> the one that runs it backwards for this
    turns: dict[tuple[Turn, int, int], Ref] = field(default_factory=dict)  # by read or write, and wave


class Backwards:
    """One request's graph while its backwards are worked out. Made nodes are numbered behind the user's."""

    def __init__(
        self,
        graph: Graph,
        resolved: Resolved,
        facts: Facts,
        scale: Scale,
        earliest: Sequence[int] | None,
        table: ModelTable,
    ) -> None:
        self.nodes: list[Node] = list(graph.nodes)
        self._table = table
        self.facts = list(facts)
        self.live = find_live(graph, resolved)
        self.num_own = len(self.nodes)
        self._resolved, self._scale = resolved, scale
        self._ordering = Ordering(graph, resolved, self.live)
        self._placer = Placer(graph, resolved, self._ordering.order, scale, earliest)
        self.earliest = earliest
        self.points = self._placer.points  # grows with the nodes
        self._reached: dict[int, int] = {}  # nodes that have points -> their places in the ordering
        self._asking: dict[int, list[int]] = {}  # backwards -> the live nodes that see or change gradients of theirs
        for node, one in enumerate(self.nodes):
            if isinstance(one, (Grad, GradWrite)) and self.live[node]:
                self._asking.setdefault(one.backward.node, []).append(node)
        self.found: dict[int, Ref] = {}  # Grad nodes -> their values
        # (wave, order, invoke) -> turns
        self.visits: dict[tuple[int, int, int], list[tuple[int, int, int, NodeId]]] = {}
        self.last_uses: dict[int, int] = {}  # wave -> the last that runs it backwards

    def run_back(self, at: NodeId, event: Backward) -> None:
        """Makes the gradients of one backward."""
        self.reach(event.loss.node)
        if event.gradient is not None:
            self.reach(event.gradient.node)
        sweep = _Sweep(event=event)
        for node in self._asking.get(at, ()):
            asking = self.nodes[node]
            assert isinstance(asking, (Grad, GradWrite))
            self._check_target(asking)
            self.reach(asking.of.node)
            if isinstance(asking, Grad):
                sweep.wanted.setdefault(asking.of.node, []).append(node)
            else:
                sweep.given[asking.of.node] = node
        loss = event.loss.node
        path = self._path(loss, {*sweep.wanted, *sweep.given})
        self._open_waves(sweep, path)
        sweep.parts[loss] = [event.gradient or self._make(SeedGrad(of=event.loss, where=event.where), loss)]
        for node in sorted({*path.nodes, *sweep.wanted, *sweep.given}, key=self._reached.__getitem__, reverse=True):
            self._hand_on(sweep, path, node)

    def _check_target(self, asking: Grad | GradWrite) -> None:
        target = self.nodes[asking.of.node]
        if isinstance(target, Parameter):
            told = f"the gradient of {target.path} would count its uses in this program alone, not the model's own"
            raise GraphError(
                f"{told}: take that of a value of the model, or of a tensor that you bring", where=asking.where
            )
        if not self._is_floating(asking.of.node):
            raise GraphError("this value has no gradient: it is not floating", where=asking.where)

    def _place_of(self, read: int) -> Place:
        """The first place in the model's order at which the tensor of a read is seen: there its gradient is whole.

        Its own where somebody has written to the tensor before.
        """
        event, entry = self.nodes[read], self._resolved.sites[read]
        assert isinstance(event, Read) and entry is not None
        info, leaf = entry
        own = Place(info.stage, info.order, None)
        if leaf.tensor is None:
            return own
        for write in self._ordering.order.writes[event.invoke][: self._ordering.order.seen[read]]:
            written = self._resolved.sites[write]
            if written is not None and written[1].tensor == leaf.tensor:
                return own
        first, found = self._table.tensors[leaf.tensor]
        is_seen = found.read_refusal is None and found.gradient_refusal is None
        site = Site(module=first.module, port=first.port, selector=found.selector, visit=first.visit)
        return Place(first.stage, first.order, site) if is_seen and first.order < info.order else own

    def reach(self, node: int) -> None:
        """Puts a node and all that it waits for in order, and gives them points."""
        self._ordering.reach(node)
        ordered = self._ordering.order.nodes
        while len(self._reached) < len(ordered):
            reached = ordered[len(self._reached)]
            event = self.nodes[reached]
            if isinstance(event, Grad):
                if reached not in self.found:
                    told = "this gradient is needed before the backward that gives it has run: move that line up"
                    raise GraphError(told, where=event.where)
                self.points[reached] = self.points[self.found[reached].node]
            elif not isinstance(event, (Backward, GradWrite)):
                self._placer.put(reached)
            self._reached[reached] = len(self._reached)

    # --- the path

    def _path(self, loss: int, targets: set[int]) -> _Path:
        nodes, order = self.nodes, self._ordering.order
        before = self._needed_by(loss)
        first: dict[int, int] = {}
        for target in targets:
            event = nodes[target]
            if isinstance(event, Read):
                _lower(first, event.invoke, self._place_of(target).order)
        path = _Path(nodes=set(), reads=[], first=first)
        for node in order.nodes:
            if node not in before or not self._is_on(node, path, targets):
                continue
            event = nodes[node]
            path.nodes.add(node)
            if isinstance(event, Read):
                path.reads.append(node)
            elif isinstance(event, Write):
                _lower(first, event.invoke, self._resolved.order(node))
        return path

    def _needed_by(self, loss: int) -> set[int]:
        """What the loss depends on as far as gradients go, itself included."""
        order = self._ordering.order
        found = {loss}
        waiting = [loss]
        while waiting:
            node = waiting.pop()
            event = self.nodes[node]
            parts: Iterable[int] = ()
            if isinstance(event, Read):
                parts = order.writes[event.invoke][: order.seen[node]]
            elif self._passes_on(node):
                parts = self._resolved.operands[node]
            fresh = [part for part in parts if part not in found]
            found.update(fresh)
            waiting += fresh
        return found

    def _is_on(self, node: int, path: _Path, targets: set[int]) -> bool:
        """Whether a node that the loss needs depends on a target; those before it are known."""
        if node in targets:
            return True
        event = self.nodes[node]
        if isinstance(event, Read):
            return path.first.get(event.invoke, NOWHERE) <= self._resolved.order(node)
        if not self._passes_on(node):
            return False
        return any(part in path.nodes or part in targets for part in self._resolved.operands[node])

    def _passes_on(self, node: int) -> bool:
        """Whether a node hands gradients on to its operands."""
        event = self.nodes[node]
        if isinstance(event, Write):
            return True
        is_run = isinstance(event, Call) or (isinstance(event, Op) and event.name not in _STOPS)
        return is_run and self._is_floating(node)

    def _is_floating(self, node: int) -> bool:
        known = self.facts[node]
        return known is None or known.dtype.startswith(_FLOATING)

    def _open_waves(self, sweep: _Sweep, path: _Path) -> None:
        """Appends the waves that run others backwards: those with a read on the path, the last first."""
        scale = self._scale
        used = 1 + max((scale.wave(point) for point in self.points if point != PURE), default=0)
        scale.of.extend([None] * (used - len(scale.of)))
        for wave in sorted({scale.wave(self.points[read]) for read in path.reads}, reverse=True):
            sweep.waves[wave] = self.last_uses[wave] = len(scale.of)
            scale.of.append(wave)
        order = self._ordering.order
        for read in path.reads:  # what was written where a read looks takes its gradient, whoever wants it
            event = self.nodes[read]
            assert isinstance(event, Read)
            for write in order.writes[event.invoke][: order.seen[read]]:
                if self._resolved.order(write) >= path.first[event.invoke]:
                    self._turn(sweep, Turn.TAKE, write, scale.wave(self.points[read]))

    # --- gradients, from later values to earlier ones

    def _hand_on(self, sweep: _Sweep, path: _Path, node: int) -> None:
        """Once all its users have given theirs: a value's gradient goes to what it was made of."""
        event = self.nodes[node]
        if isinstance(event, Write):
            taken = [sweep.turns.get((Turn.TAKE, node, wave)) for wave in sweep.waves]
            sweep.parts.setdefault(event.value.node, []).extend([turn for turn in taken if turn is not None])
            return
        if node in sweep.members:
            assert isinstance(event, (Op, Call))
            found = sweep.members[node]
            sums = [self._sum(found.get(place, ())) for place in range(1 + max(found))]
            self._give_operands(sweep, path, node, event, tuple(sums))
            return
        total = self._sum(sweep.parts.get(node, ()))
        if isinstance(event, Read):
            total = self._at_site(sweep, path, node, event, total)
        asked = sweep.wanted.get(node, [])
        given = sweep.given.get(node)
        if total is None:
            for asking in [*asked, *([] if given is None else [given])]:
                told = f"the loss at {sweep.event.where} does not depend on this value: it has no gradient"
                raise GraphError(told, where=self.nodes[asking].where)
            return
        for asking in asked:
            self.found[asking] = total
        for asking in asked:
            self.reach(asking)
        if given is not None:
            total = self._given(sweep, node, given)
        if isinstance(event, Op) and event.name == "item" and self._is_several(event):
            several, place = event.args
            assert isinstance(several, Ref) and isinstance(place, int)
            sweep.members.setdefault(several.node, {}).setdefault(place, []).append(total)
        elif isinstance(event, (Op, Call)) and self._passes_on(node):
            self._give_operands(sweep, path, node, event, (total,))

    def _is_several(self, event: Op) -> bool:
        """Whether an item is one of several results of an op."""
        several = event.args[0]
        return isinstance(several, Ref) and self.facts[several.node] is None

    def _give_operands(
        self, sweep: _Sweep, path: _Path, node: int, event: Op | Call, gradients: tuple[Ref | None, ...]
    ) -> None:
        parts = operands(event)
        needs = tuple([Ref(part) for part in parts])
        for part in dict.fromkeys(parts):
            is_wanted = part in path.nodes or part in sweep.wanted or part in sweep.given
            if is_wanted and self._is_floating(part):
                made = OpGrad(
                    op=NodeId(node), operand=parts.index(part), needs=needs, gradients=gradients, where=event.where
                )
                sweep.parts.setdefault(part, []).append(self._make(made, part))

    def _at_site(self, sweep: _Sweep, path: _Path, node: int, event: Read, own: Ref | None) -> Ref | None:
        """Hands what a read's users gave to the model; the total there, when somebody wants it."""
        wave = self._scale.wave(self.points[node])
        if own is not None:
            self._turn(sweep, Turn.ADD, node, wave, own)
        if node not in sweep.wanted and node not in sweep.given:
            return own
        place = self._place_of(node)
        waves = {
            self._scale.wave(self.points[read])
            for read in path.reads
            if self._is_of(read, event.invoke) and (read == node or self._resolved.order(read) >= place.order)
        }
        looks = [self._turn(sweep, Turn.LOOK, node, one) for one in sorted(waves, reverse=True) if one >= wave]
        return self._sum(looks)

    def _is_of(self, read: int, invoke: int) -> bool:
        event = self.nodes[read]
        return isinstance(event, Read) and event.invoke == invoke

    def _given(self, sweep: _Sweep, node: int, given: int) -> Ref:
        """The gradient that a user gives instead; from here on it is the one."""
        write = self.nodes[given]
        assert isinstance(write, GradWrite)
        try:
            self.reach(write.value.node)
        except GraphError as error:
            told = f"what this gradient becomes depends on one that comes later on the way back: {error.message}"
            raise GraphError(told, where=write.where) from error
        value = self.found.get(write.value.node, write.value)
        looked = [wave for (turn, at, wave) in sweep.turns if turn is Turn.LOOK and at == node]
        for wave in looked:  # the model's gradient is the sum over its waves
            is_one = wave == min(looked)
            rest = value if is_one else self._make(Op(name="zeros_like", args=(value,), where=write.where), node)
            self._turn(sweep, Turn.SET, node, wave, rest)
        return value

    def _sum(self, parts: Sequence[Ref]) -> Ref | None:
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self._make(Op(name="add", args=(total, part), where=self.nodes[part.node].where), part.node)
        return total

    # --- made nodes

    def _turn(self, sweep: _Sweep, turn: Turn, at: int, wave: int, value: Ref | None = None) -> Ref:
        """A turn at the site of a read or write, once each."""
        known = sweep.turns.get((turn, at, wave))
        if known is not None:
            return known
        event = self.nodes[at]
        assert isinstance(event, (Read, Write))
        found = self._resolved.sites[at]
        if found is not None and found[1].gradient_refusal is not None:
            raise GraphError(f"{event.site} has no gradient: {found[1].gradient_refusal}", where=event.where)
        back = sweep.waves[wave]
        like = event.value.node if isinstance(event, Write) else at
        order, at_first = self._resolved.order(at), None
        if turn in (Turn.LOOK, Turn.SET):  # of all who hold the tensor
            place = self._place_of(at)
            order, at_first = place.order, None if place.site is None else (place.site, place.stage, place.order)
        node = SiteGrad(turn=turn, at=NodeId(at), wave=back, value=value, first=at_first, where=event.where)
        made = self._make(node, like)
        # of one visit: behind the last write, that write, before it, ...; at one of these places as the turns go
        before = sum(
            one < at for one in self._ordering.order.writes[event.invoke] if self._resolved.order(one) == order
        )
        rank = (-2 * before - 1, 0) if turn is Turn.TAKE else (-2 * before, _RANKS[turn])
        self.visits.setdefault((back, order, event.invoke), []).append((*rank, -at, made.node))
        sweep.turns[turn, at, wave] = made
        return made

    def _make(self, node: Node, like: int) -> Ref:
        """Appends a node whose value has the shape and dtype of another's."""
        made = NodeId(len(self.nodes))
        needs = max([self.points[part] for part in operands(node)], default=PURE)
        point = needs
        if isinstance(node, SiteGrad):
            entry = self._resolved.sites[node.at]
            assert entry is not None
            stage, order = (entry[0].stage, entry[0].order) if node.first is None else node.first[1:]
            point = self._scale.point(node.wave, stage, order)
            if needs > point:
                raise GraphError("what adds to this gradient comes too late on the way back", where=node.where)
        elif isinstance(node, OpGrad) and isinstance(self.nodes[node.op], Call):
            point = call_point(needs, self._resolved.homes[node.op], self._scale)
        self.nodes.append(node)
        self.facts.append(self.facts[like])
        self.live.append(True)
        self.points.append(point)
        return Ref(made)


def _lower(found: dict[int, int], key: int, value: int) -> None:
    found[key] = min(found.get(key, value), value)
