"""Nodes that ranks run together: ops on parts of values, and gradients of calls.

Other ranks wait for what travels there, so a request that has failed takes part with nothing in its hands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.below import finish, prepare, run_apart, travel, travels, with_parts
from engine.calls import ModuleCall
from engine.memory import told_out_of_memory
from polytrace.graph import Call, NodeId, Op, Operand, OpGrad, Ref
from scheduling.plan import Cut

if TYPE_CHECKING:
    from engine.fragments import RequestState


def run_below(state: RequestState, node_id: NodeId, node: Op) -> Any:
    """An op on this rank's part of a value, in two halves with what travels between them."""
    below, links = state.program.below[node_id], state.context.links
    if state.has_failed and not travels(below):
        return None
    kwargs = {name: state.resolve(arg) for name, arg in node.kwargs.items()}
    args: tuple[Any, ...] = ()
    sent = None
    if not state.has_failed:
        try:
            args = tuple(state.resolve(arg) for arg in node.args)
            if not travels(below):
                return run_apart(below, node.name, args, kwargs, links)
            args = with_parts(below, args, links)
            sent = prepare(below, node.name, args, kwargs, links)
        except Exception as error:  # the user's, and other ranks wait for what is to travel
            if told_out_of_memory(error) is not None:
                raise
            state.fail(node_id, told_of(error))
    if sent is None and travels(below):
        args = with_parts(below, tuple(placeholder(state, arg) for arg in node.args), links)
        sent = prepare(below, node.name, args, kwargs, links)
    if sent is None:
        return None
    received = travel(below, sent, links)
    return None if state.has_failed else finish(below, node.name, args, kwargs, received, links)


def call_gradient(state: RequestState, node: OpGrad) -> Tensor | None:
    """The gradient with regard to what a module was called on."""
    call = state.program.graph.nodes[node.op]
    assert isinstance(call, Call)
    if state.has_failed and state.context.links.ranks == 1:
        return None
    needed = {ref.node for ref in (*node.needs, *node.gradients) if ref is not None}
    values = {part: placeholder(state, Ref(part)) if state.has_failed else state.values[part] for part in needed}
    given = [None if ref is None else values[ref.node] for ref in node.gradients]
    found = ModuleCall(state.context, call).gradient(call, node.needs[node.operand].node, values, given)
    return None if state.has_failed else found


def placeholder(state: RequestState, operand: Operand) -> Any:
    """In the place of an operand where the request has failed: of its planned shape."""
    facts = state.program.facts[operand.node] if isinstance(operand, Ref) else None
    if facts is None:
        return operand if not isinstance(operand, Ref) else state.resolve(operand)
    assert isinstance(operand, Ref)
    below = state.program.below.get(operand.node)
    cut = None if below is None else below.result
    shape = facts.shape if cut is None else local_shape(state, facts.shape, cut)
    return torch.zeros(shape, dtype=getattr(torch, facts.dtype), device=state.context.device)


def local_shape(state: RequestState, shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape of this rank's part."""
    return (*shape[: cut.dim], cut.size // state.context.links.ranks, *shape[cut.dim + 1 :])


def told_of(error: Exception) -> str:
    """The first lines of an error, for its user."""
    if isinstance(error, KeyError):
        return f"a value it needs is missing: {error}"
    return str(error).strip().split("\n")[0][:500] or type(error).__name__
