"""What a request reads and writes at the sites of a pass: which rows these are, and their values.

Owns what a read sees of its own request's writes of the same visit. How a write lands is `engine.writes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.copies import to_device
from engine.pair_views import check_pairs, pairs_of, read_pairs
from engine.rank_nodes import local_shape
from engine.slices import gather_whole, take_part
from engine.views import RowView
from engine.writes import PortValue, RowWrite
from polytrace.description import Rows, SiteInfo
from polytrace.graph import Invoke, NodeId, Port, Read, SiteGrad, Write
from scheduling.columns import columns_of
from scheduling.plan import Fragment

if TYPE_CHECKING:
    from engine.fragments import RequestState


def read_site(state: RequestState, node_id: NodeId, node: Read, order: int, port: PortValue) -> Tensor:
    """What a read gives at its visit; where ranks split the site they put it together."""
    leaf = state.context.sites[node.site][1]
    rows = rows_of(state, node_id, node)
    if port.pairs is not None:
        before = state.program.invokes[node.invoke].before
        value = read_pairs(port.pairs, rows, state.rows[node.invoke].view, before)
    elif port.attended is not None and state.program.invokes[node.invoke].before:
        value = port.attended.read(state.rows[node.invoke].view, state.program.invokes[node.invoke].before)
    elif port.heads is not None:
        value = port.heads.read(rows)
    else:
        # In one layout wherever its rows lie: torch adds up in another order over other strides.
        value = rows.read(port.tensors[node.site.selector], port.outputs).contiguous()
        if leaf.row_dim != 1:
            value = value.movedim(1, leaf.row_dim)
    if leaf.sharded_view_dim is not None and node_id not in state.program.below:
        blocks, copies = leaf.sharded_blocks, leaf.sharded_copies
        value = gather_whole(state.context.links, value, leaf.sharded_view_dim, blocks, copies)
    elif rows.is_run and (leaf.mutated or state.in_place_until.get(node.invoke, -1) >= order):
        value = value.clone()  # a snapshot: something may still write to this memory
    written = state.written.get((node.site.selector, node.invoke), ())
    if not written:
        return value
    return _with_own_writes(state, node_id, value, written, state.program.invokes[node.invoke], rows, leaf.column_dim)


def write_site(state: RequestState, node_id: NodeId, node: Write, port: PortValue) -> None:
    """Hands the rows that a write changes to its visit."""
    leaf = state.context.sites[node.site][1]
    rows = rows_of(state, node_id, node)
    selector = node.site.selector
    value: Tensor = state.values[node.value.node]
    num_sequences, num_columns = rows.shape
    invoke = state.program.invokes[node.invoke]
    planned = leaf.view_shape(num_sequences, invoke.longest, num_columns, before=invoke.before)
    below = state.program.below.get(node_id)
    if below is not None:
        planned = local_shape(state, planned, below.cut)
    if tuple(value.shape) != planned:
        raise ValueError(f"the value has shape {list(value.shape)}, the site {list(planned)}")
    if port.pairs is None:
        value = value.to(port.tensors[selector].dtype)
    else:
        value = value.float()
        columns = columns_of(state.program.narrowed, node_id, invoke)
        check_pairs(value, columns, state.rows[node.invoke].view, port.pairs, invoke.before)
    written = state.written.setdefault((selector, node.invoke), [])
    is_assigned = any(not state.is_in_place(other) for other, _ in written)
    turn = len(written)
    written.append((node_id, value))
    if leaf.sharded_view_dim is not None and below is None:
        blocks, copies = leaf.sharded_blocks, leaf.sharded_copies
        value = take_part(state.context.links, value, leaf.sharded_view_dim, blocks, copies)
    if port.pairs is not None:
        value = pairs_of(value, rows, state.rows[node.invoke].view, port.pairs, invoke.before)
    if leaf.row_dim != 1:
        value = value.movedim(leaf.row_dim, 1)
    in_place = node.in_place and not is_assigned
    port.write(selector, RowWrite(rows=rows, value=value, in_place=in_place, turn=turn))


def rows_of(state: RequestState, node_id: NodeId, node: Read | Write) -> RowView:
    """The rows that a read gives, or that a write changes."""
    info, leaf = state.context.sites[node.site]
    levels = state.context.levels
    level = levels.of(info.order)
    if isinstance(node, Write):
        return _rows(state, node_id, node, info, level if _is_taped(state) else levels.acts_from(info.order))
    if leaf.num_columns is None and levels.is_output(info.order) and node.site.selector in ((), (0,)):
        return state.rows[node.invoke].behind(level, state.program.narrowed.get(node_id))
    return _rows(state, node_id, node, info, level)


def rows_at(state: RequestState, fragment: Fragment) -> Iterator[int]:
    """Rows of the stream that a fragment reads or writes at a visit inside of a layer."""
    for node_id in fragment.nodes:
        node = state.program.graph.nodes[node_id]
        if isinstance(node, (Read, Write)):
            info = state.context.sites[node.site][0]
            yield from _rows(state, node_id, node, info, state.context.levels.of(info.order)).numbers


def rows_back(state: RequestState, order: int) -> Iterator[int]:
    """Rows of the stream whose gradients are seen or changed at a visit, once this wave is run backwards."""
    assert state.member is not None
    for wave in state.program.waves:
        works = wave.stages if wave.of == state.member.wave else ()
        fragments = [fragment for work in works for fragment in work.fragments if fragment.order == order]
        for node in [state.program.graph.nodes[node_id] for fragment in fragments for node_id in fragment.nodes]:
            at = state.program.graph.nodes[node.at] if isinstance(node, SiteGrad) else None
            if isinstance(node, SiteGrad) and isinstance(at, (Read, Write)):
                yield from rows_of(state, node.at, at).numbers


def own_what_stays(state: RequestState, fragment: Fragment, port: PortValue) -> None:
    """Copies values that outlive the visit out of the stream, so that they do not keep all its rows alive."""
    packed = {tensor.untyped_storage().data_ptr() for tensor in port.tensors.values()}
    for node_id in fragment.nodes:
        value = state.values.get(node_id)
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in packed:
            state.values[node_id] = value.clone()


def _with_own_writes(
    state: RequestState,
    node_id: NodeId,
    value: Tensor,
    written: list[tuple[NodeId, Tensor]],
    invoke: Invoke,
    rows: RowView,
    column_dim: int,
) -> Tensor:
    """What a read of this visit sees behind its own invoke's writes of the same visit."""
    value = value.clone()
    columns = columns_of(state.program.narrowed, node_id, invoke)
    seen = value.movedim(column_dim, 1)  # views: what is put there is in the value
    for write, given in written:
        theirs = {column: place for place, column in enumerate(columns_of(state.program.narrowed, write, invoke))}
        common = [(place, theirs[column]) for place, column in enumerate(columns) if column in theirs]
        if common:
            here, there = to_device(common, value.device).T
            seen.index_copy_(1, here, given.movedim(column_dim, 1).index_select(1, there))
    if not rows.is_whole:
        real = torch.zeros(rows.shape, dtype=torch.bool, device=value.device)
        real.view(-1).index_fill_(0, rows.cells, True)
        seen.masked_fill_(~real.view(*rows.shape, *[1] * (value.ndim - 2)), 0)
    return value


def _rows(state: RequestState, node_id: NodeId, node: Read | Write, info: SiteInfo, level: int) -> RowView:
    columns = state.program.narrowed.get(node_id)
    rows = state.rows[node.invoke]
    if node.site.port is Port.TOKEN:
        return rows.tokens(columns)
    if info.rows is Rows.DECODER:
        return rows.decoder
    if info.rows is not Rows.ALL:
        return rows.kept(columns)
    is_inside = state.context.levels.is_inside(info.order)
    return rows.inside(level, columns) if is_inside else rows.at(level, columns)


def _is_taped(state: RequestState) -> bool:
    """Whether gradients are run through this pass: what is written behind a layer is written right there."""
    wave = None if state.member is None else state.program.waves[state.member.wave]
    return wave is not None and (wave.is_taped or wave.of is not None)
