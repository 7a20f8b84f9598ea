"""Graphs without what nothing needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from polytrace.given import given_names
from polytrace.graph import (
    Backward,
    Call,
    Constant,
    Grad,
    GradWrite,
    Graph,
    Invoke,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Options,
    Read,
    Ref,
    Request,
    Save,
    SeedGrad,
    SiteGrad,
    Stop,
    Write,
    operands,
    refs,
)
from polytrace.tensors import RawTensor


def effects(nodes: Sequence[Node]) -> Iterator[NodeId]:
    """The nodes that do something by themselves: writes, also of gradients, saves and stops."""
    return (NodeId(position) for position, node in enumerate(nodes) if isinstance(node, (Write, Save, Stop, GradWrite)))


def with_grad_writes(nodes: Sequence[Node], writes: Iterable[NodeId]) -> list[bool]:
    """Per node, whether an effect needs it, or one of these changes of gradients whose backward somebody needs."""
    wanted = [node for node in effects(nodes) if not isinstance(nodes[node], GradWrite)]
    waiting = list(writes)
    while True:
        live = needed(nodes, wanted)
        acting = [place for place in waiting if live[operands(nodes[place])[1]]]
        if not acting:
            return live
        wanted += acting
        waiting = [place for place in waiting if place not in acting]


def needed(nodes: Sequence[Node], wanted: Iterable[NodeId]) -> list[bool]:
    """Per node, whether it is wanted or a node that is wanted needs it."""
    live = [False] * len(nodes)
    for node in wanted:
        live[node] = True
    for position in range(len(nodes) - 1, -1, -1):
        if live[position]:
            for part in operands(nodes[position]):
                live[part] = True
    return live


def cone(nodes: Sequence[Node], wanted: NodeId) -> list[NodeId]:
    """A node and all that it needs, in order; the other nodes are not looked at."""
    found = {wanted}
    waiting = [wanted]
    while waiting:
        fresh = [part for part in operands(nodes[waiting.pop()]) if part not in found]
        found.update(fresh)
        waiting += fresh
    return sorted(found)


def renumber(nodes: Sequence[Node], kept: Iterable[NodeId]) -> tuple[tuple[Node, ...], dict[NodeId, NodeId]]:
    """The kept nodes alone, in order, and the new place of each; what a kept node needs is kept."""
    places: dict[NodeId, NodeId] = {}
    found: list[Node] = []
    for position in kept:
        place = NodeId(len(found))
        # nothing is gone before a node that stays in its place
        found.append(nodes[position] if place == position else moved(nodes[position], places))
        places[position] = place
    return tuple(found), places


def alone(
    nodes: Sequence[Node],
    invokes: Sequence[Invoke],
    constants: Mapping[str, RawTensor],
    options: Options,
) -> Request:
    """Nodes as a request of their own, with the prompts and constants that they name and no others."""
    places: dict[int, int] = {}  # of the invokes that are named
    brought: dict[str, RawTensor] = {}
    own: list[Node] = []
    for node in nodes:
        if isinstance(node, (Read, Write, Mask, Stop)):
            node = replace(node, invoke=places.setdefault(node.invoke, len(places)))
        elif isinstance(node, Constant):
            brought[node.name] = constants[node.name]
        own.append(node)
    for invoke in places:
        brought |= {name: constants[name] for name in given_names(invokes[invoke].inputs)}
    return Request(
        graph=Graph(nodes=tuple(own)),
        invokes=tuple([invokes[invoke] for invoke in places]),
        constants=brought,
        options=options,
    )


def moved(node: Node, places: Mapping[NodeId, NodeId]) -> Node:
    """The node with operands that name their new places."""
    return _moved(node, places) if operands(node) or isinstance(node, SiteGrad) else node


def _moved(node: Node, places: Mapping[NodeId, NodeId]) -> Node:
    """The node with operands that name their new places."""
    if isinstance(node, Op):
        args = tuple([_move(arg, places) for arg in node.args])
        kwargs = {key: _move(value, places) for key, value in node.kwargs.items()}
        return Op(name=node.name, args=args, kwargs=kwargs, where=node.where)
    if isinstance(node, Call):
        return Call(module=node.module, args=tuple([_move(arg, places) for arg in node.args]), where=node.where)
    if isinstance(node, Write):
        value = _move_ref(node.value, places)
        return Write(
            site=node.site,
            invoke=node.invoke,
            value=value,
            in_place=node.in_place,
            where=node.where,
            step=node.step,
            num_steps=node.num_steps,
        )
    if isinstance(node, (Save, Stop)):
        return replace(node, value=_move_ref(node.value, places))
    if isinstance(node, Last):
        return replace(node, values=tuple([_move_ref(value, places) for value in node.values]))
    return _moved_gradient(node, places)


def _moved_gradient(node: Node, places: Mapping[NodeId, NodeId]) -> Node:
    if isinstance(node, Backward):
        weights = None if node.gradient is None else _move_ref(node.gradient, places)
        return replace(node, loss=_move_ref(node.loss, places), gradient=weights)
    if isinstance(node, (Grad, GradWrite)):
        node = replace(node, of=_move_ref(node.of, places), backward=_move_ref(node.backward, places))
        return replace(node, value=_move_ref(node.value, places)) if isinstance(node, GradWrite) else node
    if isinstance(node, SiteGrad):
        value = None if node.value is None else _move_ref(node.value, places)
        return replace(node, at=places[node.at], value=value)
    if isinstance(node, OpGrad):
        needs = tuple([_move_ref(need, places) for need in node.needs])
        gradients = tuple([None if one is None else _move_ref(one, places) for one in node.gradients])
        return replace(node, op=places[node.op], needs=needs, gradients=gradients)
    if isinstance(node, SeedGrad):
        return replace(node, of=_move_ref(node.of, places))
    return node


def _move(operand: Operand, places: Mapping[NodeId, NodeId]) -> Operand:
    if isinstance(operand, Ref):
        return _move_ref(operand, places)
    if isinstance(operand, (tuple, list, slice)) and refs(operand):
        if isinstance(operand, slice):
            return slice(*[_move(part, places) for part in (operand.start, operand.stop, operand.step)])
        moved = [_move(part, places) for part in operand]
        return tuple(moved) if isinstance(operand, tuple) else moved
    return operand


def _move_ref(ref: Ref, places: Mapping[NodeId, NodeId]) -> Ref:
    place = places[ref.node]
    return ref if place == ref.node else Ref(place)
