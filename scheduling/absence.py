"""What does not come: values of sequences that have ended, and all that would be made of them.

A step's program is worked out for all invokes of its request. Where an invoke's sequences have all ended, what is read
of them is *absent*, and so is what is computed from that: such nodes do nothing, and nobody misses them. `Last` takes
the first that is there, and behind the loop lists of values (`torch.stack`) lose absent members. At a step they do not:
two prompts' values in one list would change places when one of them has ended.
"""

from __future__ import annotations

from collections.abc import Collection

from polytrace.graph import Carried, Graph, Last, Mask, NodeId, Op, Operand, Read, Ref, Stop, Write, operands


def absent_nodes(graph: Graph, over: Collection[int], missing: Collection[NodeId]) -> frozenset[NodeId]:
    """The nodes that do not come when invokes are over, and `missing` are Carried nodes that nothing was left for."""
    if not over and not missing:
        return frozenset()
    absent: set[NodeId] = set()
    is_ending = any(isinstance(node, Last) for node in graph.nodes)
    for position, node in enumerate(graph.nodes):
        if _is_absent(NodeId(position), node, over, missing, absent, is_ending):
            absent.add(NodeId(position))
    return frozenset(absent)


def _is_absent(
    position: NodeId,
    node: object,
    over: Collection[int],
    missing: Collection[NodeId],
    absent: set[NodeId],
    is_ending: bool,
) -> bool:
    if isinstance(node, Carried):
        return position in missing
    if isinstance(node, (Read, Write, Mask, Stop)) and node.invoke in over:
        return True
    if isinstance(node, Last):
        return all(value.node in absent for value in node.values)
    if isinstance(node, Op):
        return any(_lacks(part, absent, is_ending) for part in (*node.args, *node.kwargs.values()))
    return any(part in absent for part in operands(node))  # type: ignore[arg-type]


def _lacks(operand: Operand, absent: set[NodeId], is_ending: bool) -> bool:
    """Whether an op cannot run for want of an operand: of a list of values behind the loop, when none is there."""
    if isinstance(operand, Ref):
        return operand.node in absent
    if isinstance(operand, (tuple, list)):
        values = [part for part in operand if isinstance(part, Ref)]
        if is_ending and values and len(values) == len(operand):
            return all(part.node in absent for part in values)
        return any(_lacks(part, absent, is_ending) for part in operand)
    if isinstance(operand, slice):
        return any(_lacks(part, absent, is_ending) for part in (operand.start, operand.stop, operand.step))
    return False


def without_absent(operand: Operand, absent: Collection[NodeId]) -> Operand:
    """A list of values without those that are absent."""
    if isinstance(operand, (tuple, list)) and any(isinstance(part, Ref) and part.node in absent for part in operand):
        kept = [part for part in operand if not (isinstance(part, Ref) and part.node in absent)]
        return tuple(kept) if isinstance(operand, tuple) else kept
    return operand
