"""Bodies of a loop over steps that are the same at steps one behind the other, and hand nothing on, become one body.

What is recorded for each step is sent, and worked out, once for all of them: the nodes of the first with `num_steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polytrace.graph import (
    Call,
    Constant,
    Mask,
    Node,
    NodeId,
    Op,
    Parameter,
    Read,
    Ref,
    Save,
    Site,
    Stop,
    Write,
    operands,
)
from polytrace.pruning import renumber


@dataclass(frozen=True, slots=True)
class Body:
    """What was recorded for one step: nodes in their order, without those that belong to no step."""

    loop: int
    step: int
    nodes: tuple[NodeId, ...]
    places: Mapping[NodeId, int]  # of these nodes among them


def merged(nodes: tuple[Node, ...], bodies: Sequence[Body]) -> tuple[Node, ...]:
    """The nodes with one body for each run of bodies that are the same. `bodies` are in the order of the nodes."""
    if not bodies:
        return nodes
    owners = {node: place for place, body in enumerate(bodies) for node in body.nodes}
    saves: list[dict[int, list[tuple[NodeId, Save]]]] = [{} for _ in bodies]  # per body, by the place of what is saved
    is_handed_on = [False] * len(bodies)  # something else than saves of its step needs a value of it
    for place, node in enumerate(nodes):
        for part in operands(node):
            owner = owners.get(part)
            if owner is None or owner == owners.get(NodeId(place)):
                continue
            if isinstance(node, Save) and (node.step, node.num_steps) == (bodies[owner].step, 1):
                saves[owner].setdefault(bodies[owner].places[part], []).append((NodeId(place), node))
            else:
                is_handed_on[owner] = True
    changed: dict[NodeId, Node] = {}
    dropped: set[NodeId] = set()
    for run in _runs(nodes, bodies, saves, is_handed_on):
        first, others = bodies[run[0]], [bodies[place] for place in run[1:]]
        for place in first.nodes:
            node = nodes[place]
            if isinstance(node, (Read, Write, Stop)):
                changed[place] = replace(node, num_steps=len(run))
        for place, save in _all(saves[run[0]]):
            changed[place] = replace(save, num_steps=len(run))
        dropped.update(place for body in others for place in body.nodes)
        dropped.update(place for body in run[1:] for place, _ in _all(saves[body]))
    if not dropped:
        return nodes
    new = [changed.get(NodeId(place), node) for place, node in enumerate(nodes)]
    return renumber(new, [NodeId(place) for place in range(len(nodes)) if place not in dropped])[0]


def is_of_a_step(node: Node) -> bool:
    """Whether a node that was recorded in a body belongs to it, and not to whoever uses it first."""
    return not isinstance(node, (Constant, Parameter, Mask))


def _runs(
    nodes: Sequence[Node],
    bodies: Sequence[Body],
    saves: Sequence[Mapping[int, list[tuple[NodeId, Save]]]],
    is_handed_on: Sequence[bool],
) -> Iterator[list[int]]:
    """Places of bodies that may be one, two or more of them at a time."""
    run: list[int] = []
    for place, body in enumerate(bodies):
        before = bodies[run[-1]] if run else None
        follows = (
            before is not None
            and not is_handed_on[place]
            and (body.loop, body.step) == (before.loop, before.step + 1)
            and _names(saves[place]) == _names(saves[run[-1]])
            and _are_same(nodes, before, body)
        )
        if not follows:
            if len(run) > 1:
                yield run
            run = []
        if body.nodes and not is_handed_on[place]:
            run.append(place)
    if len(run) > 1:
        yield run


def _are_same(nodes: Sequence[Node], one: Body, other: Body) -> bool:
    """Whether bodies do the same, each at its step."""
    if len(one.nodes) != len(other.nodes):
        return False
    pairs = zip(one.nodes, other.nodes, strict=True)
    return all(_is_same(nodes[a], nodes[b], one, other) for a, b in pairs)


def _is_same(a: Node, b: Node, one: Body, other: Body) -> bool:
    if type(a) is not type(b) or a.where != b.where:
        return False
    if isinstance(a, Op) and isinstance(b, Op):
        return a.name == b.name and _agree((a.args, {**a.kwargs}), (b.args, {**b.kwargs}), one, other)
    if isinstance(a, Call) and isinstance(b, Call):
        return a.module == b.module and _agree(a.args, b.args, one, other)
    if isinstance(a, (Read, Write)) and a.site.port.has_earlier:
        return False  # its value has another shape at each step
    if isinstance(a, Read) and isinstance(b, Read):
        return _sited(a, one) == _sited(b, other)
    if isinstance(a, Write) and isinstance(b, Write):
        same = a.in_place == b.in_place and _sited(a, one) == _sited(b, other)
        return same and _agree(a.value, b.value, one, other)
    if isinstance(a, Stop) and isinstance(b, Stop):
        same = (a.invoke, a.step - one.step, a.num_steps) == (b.invoke, b.step - other.step, b.num_steps)
        return same and _agree(a.value, b.value, one, other)
    return False


def _sited(node: Read | Write, body: Body) -> tuple[Site, int, int, int]:
    return (node.site, node.invoke, node.step - body.step, node.num_steps)


def _agree(a: Any, b: Any, one: Body, other: Body) -> bool:
    """Whether operands are the same, values of their own bodies by place. 1, 1.0 and True are not."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Ref):
        own, others = one.places.get(a.node), other.places.get(b.node)
        return own == others and (own is not None or a.node == b.node)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_agree(*pair, one, other) for pair in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_agree(a[key], b[key], one, other) for key in a)
    if isinstance(a, slice):
        return _agree((a.start, a.stop, a.step), (b.start, b.stop, b.step), one, other)
    return bool(a == b)


def _names(saves: Mapping[int, list[tuple[NodeId, Save]]]) -> dict[int, list[tuple[str, str]]]:
    return {place: [(save.name, save.where) for _, save in own] for place, own in saves.items()}


def _all(saves: Mapping[int, list[tuple[NodeId, Save]]]) -> Iterator[tuple[NodeId, Save]]:
    for own in saves.values():
        yield from own
