"""What makes a graph well formed, whatever the model: ops of the table, operands backwards, names that exist.

Checked when a request is decoded, so the rooms behind the wire rely on it. Shapes and sites are not its business
(`engine.shapes`, the site table). Every refusal is a `GraphError` with the user's own line.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from enum import Enum

from polytrace.errors import GraphError
from polytrace.graph import (
    Backward,
    Call,
    Carried,
    Constant,
    DType,
    Grad,
    GradWrite,
    Graph,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Read,
    Ref,
    Save,
    SeedGrad,
    SiteGrad,
    Stop,
    Write,
    operands,
)
from polytrace.ops import BY_TORCH_NAME, OPS, Results
from polytrace.tensors import VALUE_DTYPES

MAX_ARGS = 16  # of one op; a list that is joined (cat, stack) is one argument
MAX_CALL_ARGS = 8


def check_graph(graph: Graph, *, num_invokes: int, constants: Collection[str]) -> None:
    """Raises GraphError at the first node that is not well formed."""
    save_names: set[str] = set()
    grad_writes: set[tuple[NodeId, NodeId]] = set()  # whose gradient, in which backward
    values: list[_Value] = []  # per node
    for position, node in enumerate(graph.nodes):
        _check_operands(graph, values, position, node)
        value = _Value.ONE
        if isinstance(node, Op):
            _check_op(graph, node)
            value = _Value.SEVERAL if returns_several(node) else _Value.ONE
        elif isinstance(node, (Read, Write, Mask, Stop)):
            if not 0 <= node.invoke < num_invokes:
                raise GraphError(f"there is no invoke {node.invoke}; this request has {num_invokes}", where=node.where)
            value = _Value.NONE if isinstance(node, (Write, Stop)) else _Value.ONE
        elif isinstance(node, Call):
            if not 1 <= len(node.args) <= MAX_CALL_ARGS:
                told = f"a module is called with 1 to {MAX_CALL_ARGS} values, not {len(node.args)}"
                raise GraphError(told, where=node.where)
        elif isinstance(node, Constant):
            if node.name not in constants:
                raise GraphError(f"there is no constant {node.name!r} in the request", where=node.where)
        elif isinstance(node, Carried):
            raise GraphError("a value that another step left is never sent", where=node.where)
        elif isinstance(node, (SiteGrad, OpGrad, SeedGrad)):
            raise GraphError("what gradients are made of is never sent", where=node.where)
        elif isinstance(node, Backward):
            value = _Value.NONE
        elif isinstance(node, (Grad, GradWrite)):
            _check_gradient(graph, node)
            if isinstance(node, GradWrite):
                if (node.of.node, node.backward.node) in grad_writes:
                    raise GraphError("the gradient of one value is changed twice in one backward", where=node.where)
                grad_writes.add((node.of.node, node.backward.node))
                value = _Value.NONE
        elif isinstance(node, Last):
            if not node.values:
                raise GraphError("the last of no values is none", where=node.where)
        elif isinstance(node, Save):
            if node.step is not None:  # `polytrace.generation` checks their names
                values.append(_Value.NONE)
                continue
            if node.name in save_names:
                raise GraphError(f"two values are saved as {node.name!r}", where=node.where)
            save_names.add(node.name)
            value = _Value.NONE
        values.append(value)


def returns_several(op: Op) -> bool:
    """Whether the op's value is a tuple, of which each `item` takes a member."""
    results = OPS[op.name].results
    if results is Results.ONE:
        return False
    if results is Results.PAIR_WITH_DIM:  # max(dim) is a pair, max() and max(other) are one value
        return "dim" in op.kwargs or (len(op.args) > 1 and not isinstance(op.args[1], Ref))
    return True


def nearest(name: str, known: Collection[str]) -> str:
    """'; did you mean a or b?' for the names nearest to one that is not known, else nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def unknown_op(name: str, where: str) -> GraphError:
    """The refusal of an op that is not in the table."""
    short = {full.removeprefix("Tensor.").removeprefix("torch.") for full in BY_TORCH_NAME if "__" not in full}
    return GraphError(f"polytrace has no operation {name!r}{nearest(name, sorted(short | OPS.keys()))}", where=where)


class _Value(Enum):
    """What a node may be used as."""

    NONE = "none"
    ONE = "one"
    SEVERAL = "several"  # only by `item`


def _check_operands(graph: Graph, values: Sequence[_Value], position: int, node: Node) -> None:
    for target in operands(node):
        if not 0 <= target < position:
            raise GraphError(f"node {position} refers to node {target}, which is not before it", where=node.where)
        value = values[target]
        if value is _Value.NONE and not (isinstance(node, (Grad, GradWrite)) and target == node.backward.node):
            raise GraphError(f"node {position} refers to node {target}, which has no value", where=node.where)
        if value is _Value.SEVERAL and not (isinstance(node, Op) and node.name == "item"):
            several = graph.nodes[target]
            assert isinstance(several, Op)
            raise GraphError(f"{several.name} returns several values: take one of them", where=node.where)


def _check_gradient(graph: Graph, node: Grad | GradWrite) -> None:
    """A gradient is of a backward, and with regard to what a program can have changed."""
    if not isinstance(graph.nodes[node.backward.node], Backward):
        raise GraphError(f"node {node.backward.node} is no backward, so it has no gradients", where=node.where)
    of = graph.nodes[node.of.node]
    if isinstance(node, GradWrite) and node.value.node == node.backward.node:
        raise GraphError("a backward has no value", where=node.where)
    if not isinstance(of, (Read, Constant, Op, Call)):
        told = f"a {type(of).__name__.lower()} has no gradient: values that are read, brought or computed have one"
        raise GraphError(told, where=node.where)


def _check_op(graph: Graph, op: Op) -> None:
    spec = OPS.get(op.name)
    if spec is None:
        raise unknown_op(op.name, op.where)
    if op.kwargs and (unknown := op.kwargs.keys() - spec.kwargs):
        names = ", ".join(sorted(unknown))
        raise GraphError(
            f"{op.name} takes no argument {names} here{nearest(min(unknown), spec.kwargs)}", where=op.where
        )
    if not 1 <= len(op.args) <= MAX_ARGS:
        raise GraphError(f"{op.name} takes 1 to {MAX_ARGS} positional arguments, not {len(op.args)}", where=op.where)
    for arg in (*op.args, *op.kwargs.values()) if op.kwargs else op.args:
        if isinstance(arg, (DType, tuple, list)):
            _check_dtypes(arg, op.where)
    if op.name in _OF_CLIENTS:
        _check_part(graph, op)
    if op.name == "left_pad" and not _is_group(op):
        raise GraphError("left_pad takes a list of views and the dimensions that run over tokens", where=op.where)


_OF_CLIENTS = frozenset({"getitem", "setitem", "set_view", "item"})  # recorded by clients, in one form only


def _check_part(graph: Graph, op: Op) -> None:
    """An op that takes or changes a part of a value."""
    if op.name == "getitem" and len(op.args) != 2:
        raise GraphError("getitem takes a value and an index", where=op.where)
    if not isinstance(op.args[0], Ref):
        raise GraphError(f"{op.name} begins with a recorded value", where=op.where)
    if op.name == "item":
        _check_item(graph, op)
    if op.name in ("setitem", "set_view") and len(op.args) != 3:
        raise GraphError(f"{op.name} takes a value, the part of it and the new part", where=op.where)
    if op.name == "set_view":
        _check_steps(op.args[1], op.where)


def _is_group(op: Op) -> bool:
    if len(op.args) != 2 or not isinstance(op.args[0], list):
        return False
    unseen = op.kwargs.get("unseen", ())
    if not isinstance(unseen, tuple) or not all(type(pads) is int and pads >= 0 for pads in unseen):
        return False
    if unseen and op.args[1] != (2, 3):
        return False
    return bool(op.args[0]) and all(isinstance(part, Ref) for part in op.args[0]) and op.args[1] in ((1,), (2, 3))


def _check_item(graph: Graph, op: Op) -> None:
    position = op.args[1] if len(op.args) == 2 else None
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise GraphError("item takes the value of a call that returns several, and a position", where=op.where)
    assert isinstance(op.args[0], Ref)
    call = graph.nodes[op.args[0].node]
    if not (isinstance(call, Op) and call.name in OPS and returns_several(call)):
        raise GraphError("item takes a member of what an op that returns several values returned", where=op.where)
    fields = OPS[call.name].fields
    if fields and position >= len(fields):
        raise GraphError(f"{call.name} returns {len(fields)} values; there is no number {position + 1}", where=op.where)


def _check_steps(steps: Operand, where: str) -> None:
    """The way from a value to a view of it: ((op name, args, ((key, operand), ...)), ...), outermost first."""
    if not isinstance(steps, tuple) or not 1 <= len(steps) <= MAX_ARGS:
        raise GraphError(f"set_view takes 1 to {MAX_ARGS} view steps", where=where)
    for step in steps:
        if not (
            isinstance(step, tuple) and len(step) == 3 and isinstance(step[1], tuple) and isinstance(step[2], tuple)
        ):
            raise GraphError("a view step is an op's name, its arguments and its keyword arguments", where=where)
        name, kwargs = step[0], step[2]
        assert isinstance(kwargs, tuple)
        if not (isinstance(name, str) and (name == "item" or (name in OPS and OPS[name].is_view))):
            raise GraphError(f"{name!r} is not an operation that returns a view", where=where)
        for pair in kwargs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and pair[0] in OPS[name].kwargs):
                raise GraphError(f"{name} does not take the keyword argument {pair!r}", where=where)


def _check_dtypes(operand: Operand, where: str) -> None:
    if isinstance(operand, DType) and operand.name not in VALUE_DTYPES:
        raise GraphError(f"polytrace has no dtype {operand.name!r}{nearest(operand.name, VALUE_DTYPES)}", where=where)
    if isinstance(operand, (tuple, list)):
        for part in operand:
            _check_dtypes(part, where)
