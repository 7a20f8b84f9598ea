"""In which order the calls of a wave go, where a model is called as it is.

Every call is one of the unmodified model, with all that it has in memory while it goes. So one goes at a time, as far
as values between them let it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from polytrace.graph import NodeId, Read, Write, operands
from scheduling.plan import Fragment, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Calls of a wave that go together, and what runs at their sites."""

    invokes: tuple[int, ...]
    fragments: tuple[Fragment, ...]  # by order; those of the prologue are in the first turn


def turns_of(program: Program, wave: int) -> list[Turn]:
    """A wave's calls one after another, each behind those that it takes values from: so one at a time is in memory.

    Calls that take values from each other go together, at each other's pace.
    """
    graph, fragments = program.graph, program.waves[wave].stages[0].fragments
    # 1) from which calls of this wave each node has its value
    needs: dict[NodeId, frozenset[int]] = {}
    behind: dict[int, set[int]] = {}  # invoke -> those that its writes take values from
    for node_id in sorted(node for fragment in fragments for node in fragment.nodes):
        node = graph.nodes[node_id]
        own = frozenset().union(*(needs.get(operand, frozenset()) for operand in operands(node)))
        if isinstance(node, (Read, Write)):
            behind.setdefault(node.invoke, set()).update(own - {node.invoke} if isinstance(node, Write) else ())
            own |= {node.invoke}
        needs[node_id] = own
    # 2) whose turn is when
    try:
        sorter = TopologicalSorter({invoke: behind[invoke] for invoke in sorted(behind)})
        order: list[tuple[int, ...]] = [(invoke,) for invoke in sorter.static_order()] or [()]
    except CycleError:
        order = [tuple(sorted(behind))]
    turn_of = {invoke: turn for turn, invokes in enumerate(order) for invoke in invokes}
    # 3) a node runs in the last turn that it needs; a value goes behind its last use
    parts: list[dict[int, list[NodeId]]] = [{} for _ in order]
    for fragment in fragments:
        for node_id in fragment.nodes:
            turn = max((turn_of[invoke] for invoke in needs[node_id]), default=0)
            parts[turn].setdefault(fragment.order, []).append(node_id)
    last: dict[NodeId, tuple[int, int]] = {}
    for turn, part in enumerate(parts):
        for visit in sorted(part):
            for node_id in part[visit]:
                last.update(dict.fromkeys(operands(graph.nodes[node_id]), (turn, visit)))
    drops: dict[tuple[int, int], list[NodeId]] = {}
    for node_id in sorted(node for fragment in fragments for node in fragment.drops):
        if node_id in last:
            drops.setdefault(last[node_id], []).append(node_id)
    return [
        Turn(
            invokes=invokes,
            fragments=tuple(
                Fragment(order=visit, nodes=tuple(part[visit]), drops=tuple(drops.get((turn, visit), ())))
                for visit in sorted(part)
            ),
        )
        for turn, (invokes, part) in enumerate(zip(order, parts, strict=True))
    ]


def joined(turns: Sequence[Turn], program: Program) -> Turn:
    """Turns that follow each other as one, in which all their calls go at the same pace.

    What a turn takes of an earlier one's calls was read at an earlier site, or at the same, before it.
    """
    if len(turns) == 1:
        return turns[0]
    nodes: dict[int, list[NodeId]] = {}
    for turn in turns:
        for fragment in turn.fragments:
            nodes.setdefault(fragment.order, []).extend(fragment.nodes)
    last: dict[NodeId, int] = {}
    for order in sorted(nodes):
        last.update((operand, order) for node in nodes[order] for operand in operands(program.graph.nodes[node]))
    drops: dict[int, list[NodeId]] = {}
    for node in sorted(node for turn in turns for fragment in turn.fragments for node in fragment.drops):
        drops.setdefault(last[node], []).append(node)
    return Turn(
        invokes=tuple([invoke for turn in turns for invoke in turn.invokes]),
        fragments=tuple(
            Fragment(order=order, nodes=tuple(sorted(nodes[order])), drops=tuple(drops.get(order, ())))
            for order in sorted(nodes)
        ),
    )
