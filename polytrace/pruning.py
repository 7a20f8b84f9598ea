"""Graphs without what nothing needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from polytrace.graph import Call, Node, NodeId, Op, Operand, Ref, Save, Write, operands


def effects(nodes: Sequence[Node]) -> Iterator[NodeId]:
    """The nodes that do something by themselves: writes and saves."""
    return (NodeId(position) for position, node in enumerate(nodes) if isinstance(node, (Write, Save)))


def needed(nodes: Sequence[Node], wanted: Iterable[NodeId]) -> set[NodeId]:
    """The wanted nodes and all that they need."""
    live = set(wanted)
    for position in range(max(live, default=-1), -1, -1):
        if position in live:
            live.update(operands(nodes[position]))
    return live


def renumber(nodes: Sequence[Node], live: set[NodeId]) -> tuple[tuple[Node, ...], dict[NodeId, NodeId]]:
    """The live nodes alone, in order, and the new place of each."""
    places: dict[NodeId, NodeId] = {}
    kept: list[Node] = []
    for position in sorted(live):
        kept.append(_moved(nodes[position], places))
        places[position] = NodeId(len(kept) - 1)
    return tuple(kept), places


def _moved(node: Node, places: Mapping[NodeId, NodeId]) -> Node:
    """The node with operands that name their new places."""
    if isinstance(node, Op):
        args = tuple(_move(arg, places) for arg in node.args)
        kwargs = {key: _move(value, places) for key, value in node.kwargs.items()}
        return Op(name=node.name, args=args, kwargs=kwargs, where=node.where)
    if isinstance(node, Call):
        return Call(module=node.module, args=tuple(_move(arg, places) for arg in node.args), where=node.where)
    if isinstance(node, Write):
        value = Ref(places[node.value.node])
        return Write(site=node.site, invoke=node.invoke, value=value, in_place=node.in_place, where=node.where)
    if isinstance(node, Save):
        return Save(name=node.name, value=Ref(places[node.value.node]), where=node.where)
    return node


def _move(operand: Operand, places: Mapping[NodeId, NodeId]) -> Operand:
    if isinstance(operand, Ref):
        return Ref(places[operand.node])
    if isinstance(operand, tuple):
        return tuple(_move(part, places) for part in operand)
    if isinstance(operand, list):
        return [_move(part, places) for part in operand]
    if isinstance(operand, slice):
        return slice(*(_move(part, places) for part in (operand.start, operand.stop, operand.step)))
    return operand
