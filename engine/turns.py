"""A graph's turn at the gradient of a site, in a pass that runs backwards.

Owns the way from a node to the rows of the pass that was run forwards, and between a request's value and what the ranks
have of it. What a turn does to gradients is `engine.gradient_port`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from engine.grad_slices import gather_gradient, take_gradient
from engine.gradient_port import GradientPort
from engine.site_rows import rows_of
from engine.views import RowView
from polytrace.description import Leaf
from polytrace.graph import NodeId, Read, SiteGrad, Turn, Write

if TYPE_CHECKING:
    from engine.fragments import RequestState


def run_turn(state: RequestState, node: SiteGrad, port: GradientPort) -> Tensor | None:
    """Takes the turn; its value, None where it has none.

    Where ranks split the site it is collective, whether the request has failed or not: then it changes nothing.
    """
    at = state.program.graph.nodes[node.at]
    assert isinstance(at, (Read, Write))
    site = at.site if node.first is None else node.first[0]
    leaf = state.context.sites[site][1]
    rows, gradient = rows_of(state, node.at, at), port.gradients[site.selector]
    if node.turn is Turn.TAKE:
        is_assigned = any(not state.is_in_place(write) for write in (*earlier(state, node.at, at), node.at))
        return _whole(state, gradient.take(rows, is_assigned=is_assigned), leaf)
    behind = _assigned(state, node.at, at)
    if node.turn is Turn.LOOK:
        return _whole(state, gradient.look(rows, behind=behind), leaf)
    if state.has_failed:
        return None
    assert node.value is not None
    value = _part(state, state.values[node.value.node], leaf)
    if node.turn is Turn.ADD:
        gradient.add(rows, value, behind=behind)
    else:
        gradient.set(rows, value, behind=behind)
    return None


def earlier(state: RequestState, node: NodeId, at: Read | Write) -> list[NodeId]:
    """Writes of its invoke to the same tensor at the same visit that come before a read or write."""
    return [write for write in state.writes_of(at.site, at.invoke) if write < node]


def _assigned(state: RequestState, node: NodeId, at: Read | Write) -> list[RowView]:
    """Rows that a read sees as they were assigned before it: by assignments, and by all writes behind these."""
    found, is_assigned = [], False
    for write in earlier(state, node, at):
        is_assigned = is_assigned or not state.is_in_place(write)
        if is_assigned:
            event = state.program.graph.nodes[write]
            assert isinstance(event, Write)
            found.append(rows_of(state, write, event))
    return found


def _whole(state: RequestState, value: Tensor, leaf: Leaf) -> Tensor:
    """A gradient of the site's shape."""
    if leaf.row_dim != 1:
        value = value.movedim(1, leaf.row_dim)
    if leaf.sharded_view_dim is not None:
        links, blocks, copies = state.context.links, leaf.sharded_blocks, leaf.sharded_copies
        value = gather_gradient(links, value.contiguous(), leaf.sharded_view_dim, blocks, copies)
    return value.contiguous()


def _part(state: RequestState, value: Tensor, leaf: Leaf) -> Tensor:
    """What of a gradient of the site's shape is this rank's."""
    if leaf.sharded_view_dim is not None:
        links, blocks, copies = state.context.links, leaf.sharded_blocks, leaf.sharded_copies
        value = take_gradient(links, value, leaf.sharded_view_dim, blocks, copies)
    return value.movedim(leaf.row_dim, 1) if leaf.row_dim != 1 else value
