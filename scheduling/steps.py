"""Cuts the graph of a generation into steps, and works each of them out once, however often it runs.

A node acts at the steps that it says; an op belongs to the latest step of its operands, and what depends on no site
belongs to whoever uses it. A step's graph is about one column of every invoke, `[sequences, 1, ...]`; what it needs of
earlier steps are its `Carried` nodes. Steps of equal graphs are one *part*: most generations have two or three. What
stands behind the loop (`Last`) is the *ending*: it runs when the last step that comes has run.

Knows nothing of tokens that are drawn (`scheduling.generating`) and of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from polytrace.errors import GraphError
from polytrace.graph import (
    Call,
    Carried,
    Graph,
    Invoke,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
    Stop,
    Write,
    operands,
)
from polytrace.pruning import moved
from polytrace.timing import is_random
from scheduling.plan import Chain, Program, Step, ValueFacts

Facts = tuple[ValueFacts | None, ...]
Infer = Callable[[Request], Facts]


class WorkOutStep(Protocol):
    def __call__(self, step: Request, facts: Facts, holds: frozenset[NodeId], *, is_first: bool) -> Program:
        """The program of one step, whose values of `holds` later steps need."""


TOKEN = Site(module="", port=Port.TOKEN)
GENERATE = "generate"  # where the reads stand that are drawn for
ENDING = 1 << 30  # the step of what stands behind the loop
_ALIGN = 16  # bytes: each step's saves begin at a multiple


@dataclass(frozen=True, slots=True)
class Span:
    """The steps at which a node acts."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count

    def covers(self, other: Span) -> bool:
        return self.first <= other.first and other.stop <= self.stop


_TIMELESS = Span(-1, 0)
_AT_END = Span(ENDING, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutStep:
    """One step's own graph. Its nodes are the request's, renumbered."""

    request: Request
    sources: Mapping[NodeId, NodeId]  # Carried nodes -> the request's nodes whose values they are
    places: Mapping[NodeId, NodeId]  # the request's nodes -> the step's


def generates(request: Request) -> bool:
    """Whether it goes on behind its prompts."""
    return any(invoke.generation is not None for invoke in request.invokes)


def num_steps(request: Request) -> int:
    """Steps of its longest generation, the prompt's included."""
    return max(invoke.generation.max_new_tokens for invoke in request.invokes if invoke.generation is not None)


class Cutter:
    """The steps of one request, one after another."""

    def __init__(self, request: Request) -> None:
        """GraphError where a value of a step is used at others in a way that no step can mean."""
        self.request = request
        self.num_steps = num_steps(request)
        self.spans: list[Span] = []
        for node in request.graph.nodes:
            self.spans.append(self._span(node))
        self._check_spans()
        self._ranges: list[tuple[Span, NodeId]] = []  # of nodes that act at several steps
        self._single: dict[int, list[NodeId]] = {}  # of those that act at one
        self._is_held = bytearray(len(self.spans))  # a later step needs its value
        for position, (node, span) in enumerate(zip(request.graph.nodes, self.spans, strict=True)):
            if span.count > 1:
                self._ranges.append((span, NodeId(position)))
            elif span != _TIMELESS:
                self._single.setdefault(span.first, []).append(NodeId(position))
            for part in operands(node):
                if self.spans[part] != _TIMELESS and not self.spans[part].covers(span):
                    self._is_held[part] = True

    @property
    def has_ending(self) -> bool:
        return ENDING in self._single

    def nodes_at(self, step: int) -> list[NodeId]:
        """The nodes that act at a step, in the program's order; without the timeless ones."""
        own = list(self._single.get(step, ()))
        own += [node for span, node in self._ranges if span.first <= step < span.stop]
        return sorted(own)

    def is_like(self, step: int) -> bool:
        """Whether a step is, without looking, the same as the one before: only what acts at both."""
        if step < 2 or step in self._single or step - 1 in self._single:
            return False
        if any(span.first <= step < span.stop for span, node in self._ranges if _has_earlier(self.request, node)):
            return False
        ends = any(step in (span.first, span.stop) for span, _ in self._ranges)
        lengths = (one.generation.max_new_tokens for one in self.request.invokes if one.generation is not None)
        return not ends and step not in lengths

    def cut(self, step: int, known: Callable[[NodeId], tuple[ValueFacts, int]]) -> CutStep:
        """The graph of a step, or of `ENDING`; `known` says what an earlier step's value is, and its stage."""
        graph, invokes = self.request.graph, self.request.invokes
        nodes: list[Node] = []
        places: dict[NodeId, NodeId] = {}
        sources: dict[NodeId, NodeId] = {}

        def take(position: NodeId) -> None:
            for part in operands(graph.nodes[position]):
                if part in places:
                    continue
                if self.spans[part] == _TIMELESS:
                    take(part)
                else:
                    facts, stage = known(part)
                    where = graph.nodes[part].where
                    places[part] = NodeId(len(nodes))
                    sources[places[part]] = part
                    nodes.append(Carried(shape=facts.shape, dtype=facts.dtype, stage=stage, where=where))
            places[position] = NodeId(len(nodes))
            nodes.append(_as_of_now(graph.nodes[position], places))

        for position in self.nodes_at(step):
            take(position)
        if step != ENDING:
            for place, invoke in enumerate(invokes):
                if invoke.generation is not None and invoke.generation.max_new_tokens > step:
                    nodes.append(Read(site=TOKEN, invoke=place, where=GENERATE))
        own = invokes
        if step > 0:
            looked_at = {
                node.invoke for node in nodes if isinstance(node, (Read, Write)) and node.site.port.has_earlier
            }
            own = tuple([_one_column(one, step, place in looked_at) for place, one in enumerate(invokes)])
        return CutStep(
            request=replace(self.request, graph=Graph(nodes=tuple(nodes)), invokes=own, keeps=self._keeps(nodes)),
            sources=sources,
            places=places,
        )

    def held(self, cut: CutStep) -> frozenset[NodeId]:
        """The step's values that later steps need."""
        return frozenset(
            place for position, place in cut.places.items() if self._is_held[position] and place not in cut.sources
        )

    def _keeps(self, nodes: list[Node]) -> tuple:  # type: ignore[type-arg]
        names = {node.name for node in nodes if isinstance(node, Save)}
        return tuple(keep for keep in self.request.keeps if keep.save in names)

    def _span(self, node: Node) -> Span:
        if isinstance(node, (Read, Write, Stop)):
            return self._within(Span(node.step, node.num_steps), node)
        if isinstance(node, Save) and node.step is not None:
            return self._within(Span(node.step, node.num_steps), node)
        if isinstance(node, Last):
            return _AT_END
        latest = _TIMELESS
        for part in operands(node):
            span = self.spans[part]
            if (span.first, span.count) > (latest.first, latest.count):
                latest = span
        if latest == _TIMELESS and (isinstance(node, (Save, Mask)) or (isinstance(node, Op) and is_random(node.name))):
            return Span(0, 1)  # of prompts, and what is computed or drawn of nothing: once
        return latest

    def _within(self, span: Span, node: Node) -> Span:
        if span.first < 0 or span.count < 1 or span.stop > self.num_steps:
            last = self.num_steps - 1
            told = f"step {span.stop - 1} is asked for; this generation has steps 0-{last}"
            raise GraphError(told, where=node.where)
        return span

    def _check_spans(self) -> None:
        for position, node in enumerate(self.request.graph.nodes):
            own = self.spans[position]
            for part in operands(node):
                span = self.spans[part]
                if span == _TIMELESS or span.covers(own) or (span.count == 1 and span.first <= own.first):
                    continue
                if span == _AT_END or span.first > own.first:
                    told = "a value of a later step is used at an earlier one"
                elif isinstance(node, Last) and span.first < own.first:
                    continue
                else:
                    told = (
                        f"a value of each of the steps {span.first}-{span.stop - 1} is used at step {own.first}, "
                        "which could be any of them: record the loop step by step, `for step in tracer.iter[...]`"
                    )
                raise GraphError(told, where=node.where)


def _as_of_now(node: Node, places: Mapping[NodeId, NodeId]) -> Node:
    """The node in its step's graph. A save keeps that it is a step's."""
    if isinstance(node, Read):
        return node if node.step == 0 and node.num_steps == 1 else replace(node, step=0, num_steps=1)
    if isinstance(node, (Write, Stop)):
        return replace(node, value=Ref(places[node.value.node]), step=0, num_steps=1)
    if isinstance(node, Save):
        step = None if node.step is None else 0
        return replace(node, value=Ref(places[node.value.node]), step=step, num_steps=1)
    if isinstance(node, Last):
        return replace(node, values=tuple([Ref(places[value.node]) for value in node.values]))
    return moved(node, places)


def _one_column(invoke: Invoke, step: int, is_looked_at: bool) -> Invoke:
    """An invoke behind its prompts: one token a sequence. `is_looked_at`: which of the tokens before it looks at."""
    goes_on = invoke.generation is not None and invoke.generation.max_new_tokens > step
    looks = is_looked_at and step != ENDING
    return Invoke(
        sequences=((0,),) * len(invoke.sequences),
        generation=invoke.generation if goes_on else None,
        before=invoke.longest + step - 1 if looks else 0,
        pads=invoke.longest - min(map(len, invoke.sequences)) if looks else 0,
    )


def _has_earlier(request: Request, position: NodeId) -> bool:
    node = request.graph.nodes[position]
    return isinstance(node, (Read, Write)) and node.site.port.has_earlier


def work_out_chain(request: Request, infer: Infer, work_out_step: WorkOutStep) -> tuple[Program, Facts]:
    """The program of a generation, and what is known of its request's nodes.

    `infer` is asked for step 0 and then for each distinct part, in their order. Raises GraphError with the user's line,
    and TooLargeError.
    """
    cutter = Cutter(request)
    facts: list[ValueFacts | None] = [None] * len(request.graph.nodes)
    homes: dict[NodeId, int] = {}
    last_use: dict[NodeId, int] = {}
    programs: dict[Hashable, int] = {}
    parts: list[Program] = []
    known_of: list[Facts] = []

    def known(node: NodeId) -> tuple[ValueFacts, int]:
        one = facts[node]
        if one is None:
            told = "the shape of this value is not known ahead, so it cannot go to a later step"
            raise GraphError(told, where=request.graph.nodes[node].where)
        return one, homes.get(node, 0)

    def note(step: int, cut: CutStep, program: Program, found: Facts) -> None:
        for position, place in cut.places.items():
            if place not in cut.sources:
                facts[position] = found[place]
                if place in program.holds:
                    homes[position] = program.holds[place]
        for position in cut.sources.values():
            last_use[position] = step

    first = cutter.cut(0, known)
    found = infer(first.request)
    base = work_out_step(first.request, found, cutter.held(first), is_first=True)
    note(0, first, base, found)

    chosen: list[tuple[int, CutStep]] = []  # of steps 1 and on: the part, and the step's graph
    for step in range(1, cutter.num_steps):
        if cutter.is_like(step):
            part, cut = chosen[-1]
        else:
            cut = cutter.cut(step, known)
            holds = cutter.held(cut)
            key = (_key_of(cut.request), holds)
            if key not in programs:
                programs[key] = len(parts)
                own = infer(cut.request)
                parts.append(work_out_step(cut.request, own, holds, is_first=False))
                known_of.append(own)
            part = programs[key]
        chosen.append((part, cut))
        note(step, cut, parts[part], known_of[part])
    ending: tuple[int, CutStep] | None = None
    if cutter.has_ending:
        cut = cutter.cut(ENDING, known)
        own = infer(cut.request)
        ending = (len(parts), cut)
        parts.append(work_out_step(cut.request, own, frozenset(), is_first=False))
        note(cutter.num_steps, cut, parts[-1], own)

    offset = _aligned(_data_bytes(base))
    steps = []
    for step, (part, cut) in enumerate(chosen, 1):
        steps.append(_step(step, parts[part], part, cut, last_use, offset))
        offset += _aligned(_data_bytes(parts[part]))
    last = None
    if ending is not None:
        last = _step(cutter.num_steps, parts[ending[0]], *ending, last_use, offset)
        offset += _aligned(_data_bytes(parts[ending[0]]))
    chain = Chain(
        parts=tuple(parts),
        holds=_holds(base, first),
        steps=tuple(steps),
        ending=last,
        data_bytes=offset,
    )
    return replace(base, chain=chain), tuple(facts)


def _step(step: int, program: Program, part: int, cut: CutStep, last_use: Mapping[NodeId, int], offset: int) -> Step:
    return Step(
        part=part,
        binds=cut.sources,
        holds=_holds(program, cut),
        drops=tuple([position for position in cut.sources.values() if last_use[position] == step]),
        offset=offset,
    )


def _holds(program: Program, cut: CutStep) -> dict[NodeId, NodeId]:
    held = set(program.holds)
    return {place: position for position, place in cut.places.items() if place in held}


def _data_bytes(program: Program) -> int:
    return max((slot.offset + slot.facts.num_bytes for slot in program.saves if slot.keep is None), default=0)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _key_of(request: Request) -> Hashable:
    """Equal keys: equal graphs on invokes of equal shape."""
    return (
        tuple([_node_key(node) for node in request.graph.nodes]),
        tuple([(len(one.sequences), one.generation is not None, one.before, one.pads) for one in request.invokes]),
    )


def _node_key(node: Node) -> Hashable:
    if isinstance(node, Op):
        kwargs = tuple([(key, _operand_key(value)) for key, value in node.kwargs.items()])
        return (node.name, tuple([_operand_key(arg) for arg in node.args]), kwargs, node.where)
    if isinstance(node, Call):
        return ("call", node.module, tuple([_operand_key(arg) for arg in node.args]), node.where)
    return node


def _operand_key(operand: Operand) -> Hashable:
    """As the operand, but that 1, 1.0 and True differ, and lists and slices can be looked up."""
    if isinstance(operand, Ref):
        return operand
    if isinstance(operand, (tuple, list)):
        return (type(operand).__name__, *[_operand_key(part) for part in operand])
    if isinstance(operand, slice):
        return ("slice", _operand_key(operand.start), _operand_key(operand.stop), _operand_key(operand.step))
    return (type(operand).__name__, operand if operand is not None else "")
