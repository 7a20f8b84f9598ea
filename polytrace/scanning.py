"""`model.scan` and `trace(validate=True)`: everything is checked by the service, and nothing runs."""

from __future__ import annotations

from enum import Enum

from polytrace.certificate import ValueShape
from polytrace.grammar import returns_several
from polytrace.graph import Backward, GradWrite, Node, NodeId, Op, Ref, Save, Write, operands
from polytrace.recording import Recording


class Checking(Enum):
    """What is asked of the service before a trace runs."""

    NONE = "none"
    VALIDATE = "validate"  # what it would cost; a program that cannot be honoured is refused before anything runs
    SCAN = "scan"  # that alone


def unused_values(recording: Recording) -> list[NodeId]:
    """Values that no other node needs, saved or not; where all are needed, the last one."""
    needed = {part for node in recording.nodes for part in operands(node)}
    values = [NodeId(place) for place, node in enumerate(recording.nodes) if _has_value(node)]
    return [value for value in values if value not in needed] or values[-1:]


def probing_nodes(recording: Recording, shapes: dict[NodeId, ValueShape]) -> tuple[Node, ...]:
    """The whole graph, of whose unused values nothing is returned: for the service to look at every node.

    `shapes` are those of the unused values.
    """
    nodes: list[Node] = list(recording.nodes)
    for number, (node, shape) in enumerate(shapes.items()):
        where, target = recording.nodes[node].where, node
        if shape.shape:  # none of its rows: what is checked costs no bytes
            nodes.append(Op(name="getitem", args=(Ref(node), slice(0, 0)), where=where))
            target = NodeId(len(nodes) - 1)
        nodes.append(Save(name=str(number), value=Ref(target), where=where))
    return tuple(nodes)


def _has_value(node: Node) -> bool:
    if isinstance(node, Op):
        return not returns_several(node)
    return not isinstance(node, (Write, Save, Backward, GradWrite))
