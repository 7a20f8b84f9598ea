"""Which columns of an invoke the head runs on: only those that somebody reads.

Sites of `Rows.KEPT` (the head's) exist for kept columns only. A read there whose users all are indexings with a static
column (`logits[:, -1]`, `logits[0, 3:7]`, `logits[0][-1]`) keeps just those; any other use, and any write, keeps every
column of the invoke in that wave. The indexings are rewritten to the compact view `[sequences, kept, *tail]`.

Invariant: after rewriting, every indexing gives what it gave on the full view.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from polytrace.description import Rows
from polytrace.graph import Graph, Invoke, Node, NodeId, Op, Operand, Read, Ref, refs
from polytrace.tensors import num_bytes
from scheduling.checks import Resolved
from scheduling.placement import Scale
from scheduling.plan import ValueFacts
from scheduling.waves import Run

Facts = tuple[ValueFacts | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the head runs on, and the graph and facts that go with it."""

    columns: dict[tuple[int, int], tuple[int, ...]]  # (wave, invoke) -> columns of its view, ascending
    graph: Graph
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Indexing:
    """A use of a read that names its columns."""

    node: int
    place: int  # of the column's part in the index
    columns: range | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """Columns of one read that its users name, and the values that have the column dimension: node -> dim."""

    indexings: tuple[_Indexing, ...]
    column_dims: dict[int, int]


def keep_columns(
    graph: Graph,
    invokes: tuple[Invoke, ...],
    resolved: Resolved,
    live: list[bool],
    facts: Facts,
    runs: list[Run],
    points: list[int],
    scale: Scale,
    *,
    has_kept_rows: bool,
) -> Kept:
    """The kept columns of every run. Without `has_kept_rows` the head runs on all rows of the stream, always."""
    everything = {(run.wave, run.invoke): tuple(range(invokes[run.invoke].longest)) for run in runs}
    if not has_kept_rows:
        return Kept(columns=everything, graph=graph, facts=facts)

    reads: dict[tuple[int, int], list[int]] = {}
    for node, entry in enumerate(resolved.sites):
        event = graph.nodes[node]
        if live[node] and entry is not None and entry[0].rows is Rows.KEPT and isinstance(event, Read):
            reads.setdefault((scale.wave(points[node]), event.invoke), []).append(node)
    users = _users(resolved, live) if reads else []

    columns: dict[tuple[int, int], tuple[int, ...]] = {}
    changed: dict[int, Node] = {}
    compact: dict[int, ValueFacts] = {}
    for run in runs:
        key = (run.wave, run.invoke)
        longest = invokes[run.invoke].longest
        demands = [_demand(graph, users, facts, node, longest) for node in reads.get(key, ())]
        is_written = any(_is_kept_site(resolved, write) for write in run.writes)
        if is_written or any(demand is None for demand in demands):
            columns[key] = everything[key]
            continue
        known = [demand for demand in demands if demand is not None]
        named = {column for demand in known for indexing in demand.indexings for column in indexing.columns}
        if known and not named:
            named = {longest - 1}  # empty slices only: a view is never without columns
        columns[key] = kept = tuple(sorted(named))
        for demand in known:
            for indexing in demand.indexings:
                changed[indexing.node] = _rewritten(graph.nodes[indexing.node], indexing, kept)
            for node, dim in demand.column_dims.items():
                compact[node] = _with_columns(facts[node], dim, len(kept))
    return Kept(columns=columns, graph=_with_nodes(graph, changed), facts=_with_facts(facts, compact))


def full_facts(graph: Graph, invokes: tuple[Invoke, ...], resolved: Resolved, facts: Facts) -> Facts:
    """The facts of a planned graph as its user sees them: values of kept sites with every column again."""
    full: dict[int, ValueFacts] = {}
    column_dims: dict[int, tuple[int, int]] = {}  # node -> the dimension of its columns, how many there are in all
    for node, event in enumerate(graph.nodes):
        entry = resolved.sites[node]
        if isinstance(event, Read) and entry is not None and entry[0].rows is Rows.KEPT:
            column_dims[node] = 1, invokes[event.invoke].longest
        elif isinstance(event, Op) and event.name == "getitem" and (base := _base(event)) in column_dims:
            dim, longest = column_dims[base]
            found = _find_column(event, base, dim, facts)
            if isinstance(found, _Passed):
                column_dims[node] = found.dim, longest
    for node, (dim, longest) in column_dims.items():
        if facts[node] is not None:
            full[node] = _with_columns(facts[node], dim, longest)
    return _with_facts(facts, full)


@dataclass(frozen=True, slots=True)
class _Passed:
    """An indexing that leaves the columns alone: they are this dimension of its result."""

    dim: int


@dataclass(frozen=True, slots=True)
class _Named:
    """An indexing with a part for the columns, at this place."""

    place: int


def _users(resolved: Resolved, live: list[bool]) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in live]
    for node, is_live in enumerate(live):
        if is_live:
            for operand in resolved.operands[node]:
                users[operand].append(node)
    return users


def _is_kept_site(resolved: Resolved, node: int) -> bool:
    entry = resolved.sites[node]
    return entry is not None and entry[0].rows is Rows.KEPT


def _demand(graph: Graph, users: list[list[int]], facts: Facts, read: int, longest: int) -> _Demand | None:
    """What the users of a read name, None when one may look at any column."""
    indexings: list[_Indexing] = []
    column_dims = {read: 1}
    pending = [read]
    while pending:
        base = pending.pop()
        for user in users[base]:
            found = _find_column(graph.nodes[user], base, column_dims[base], facts)
            if isinstance(found, _Passed):
                if facts[user] is None:
                    return None
                column_dims[user] = found.dim
                pending.append(user)
                continue
            columns = None if found is None else _named_columns(_index_of(graph.nodes[user])[found.place], longest)
            if found is None or columns is None:
                return None
            indexings.append(_Indexing(node=user, place=found.place, columns=columns))
    return _Demand(indexings=tuple(indexings), column_dims=column_dims)


def _find_column(node: Node, base: int, column_dim: int, facts: Facts) -> _Passed | _Named | None:
    """What an operation does to the column dimension of its base, None when that is not known ahead."""
    if not isinstance(node, Op) or node.name != "getitem" or len(node.args) != 2 or node.args[0] != Ref(NodeId(base)):
        return None
    parts, base_facts = _index_of(node), facts[base]
    if base_facts is None or base in tuple(refs(node.args[1])):
        return None
    widths = [_width(part, facts) for part in parts]
    known = [width for width in widths if width is not None]
    num_ellipses = sum(part is Ellipsis for part in parts)
    rest = len(base_facts.shape) - sum(known)
    if len(known) < len(parts) or num_ellipses > 1 or rest < 0:
        return None
    has_advanced = any(isinstance(part, (list, Ref)) for part in parts)  # these reorder dimensions
    dim = result_dim = 0
    for place, (part, width) in enumerate(zip(parts, known, strict=True)):
        consumed = rest if part is Ellipsis else width
        if dim <= column_dim < dim + consumed:
            if part is not Ellipsis and part != slice(None):
                return _Named(place)
            break
        dim += consumed
        result_dim += consumed if part is Ellipsis or isinstance(part, slice) else part is None
    return None if has_advanced else _Passed(result_dim + column_dim - dim)


def _width(part: Operand, facts: Facts) -> int | None:
    """Dimensions that a part of an index consumes (0 for an ellipsis), None when that is not known ahead."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Ref):
        index = facts[part.node]
        if index is None:
            return None
        return (len(index.shape) or None) if index.dtype == "bool" else 1
    if isinstance(part, slice) or type(part) is int:
        return 1
    return 1 if isinstance(part, list) and all(type(entry) is int for entry in part) else None


def _named_columns(part: Operand, longest: int) -> range | tuple[int, ...] | None:
    """The columns that a static part names; for a slice with a step, those between as well."""
    if type(part) is int:
        return _named_columns([part], longest)
    if isinstance(part, list):
        columns = tuple(_place(entry, longest) for entry in part)
        return columns if all(0 <= column < longest for column in columns) else None
    if isinstance(part, slice):
        if not all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step)):
            return None
        if part.step is not None and part.step < 1:
            return None
        found = range(*part.indices(longest))
        return range(found[0], found[-1] + 1) if found else ()
    return None


def _place(entry: object, longest: int) -> int:
    assert isinstance(entry, int)
    return entry + longest if entry < 0 else entry


def _rewritten(node: Node, indexing: _Indexing, kept: tuple[int, ...]) -> Op:
    """The indexing on the compact view."""
    assert isinstance(node, Op)
    index = node.args[1]
    parts = list(_index_of(node))
    part, columns = parts[indexing.place], indexing.columns
    if isinstance(part, slice):
        first = bisect_left(kept, columns[0]) if columns else 0
        parts[indexing.place] = slice(first, first + len(columns), part.step)
    else:
        places: list[Operand] = [bisect_left(kept, column) for column in columns]
        parts[indexing.place] = places[0] if type(part) is int else places
    new_index: Operand = tuple(parts) if isinstance(index, tuple) else parts[0]
    return replace(node, args=(node.args[0], new_index))


def _index_of(node: Node) -> tuple[Operand, ...]:
    assert isinstance(node, Op)
    index = node.args[1]
    return index if isinstance(index, tuple) else (index,)


def _base(node: Op) -> int:
    base = node.args[0] if node.args else None
    return base.node if isinstance(base, Ref) else -1


def _with_columns(facts: ValueFacts | None, dim: int, num_columns: int) -> ValueFacts:
    assert facts is not None
    shape = (*facts.shape[:dim], num_columns, *facts.shape[dim + 1 :])
    return replace(facts, shape=shape, num_bytes=num_bytes(facts.dtype, shape))


def _with_nodes(graph: Graph, changed: dict[int, Node]) -> Graph:
    if not changed:
        return graph
    return Graph(nodes=tuple(changed.get(position, node) for position, node in enumerate(graph.nodes)))


def _with_facts(facts: Facts, changed: dict[int, ValueFacts]) -> Facts:
    if not changed:
        return facts
    return tuple(changed.get(position, old) for position, old in enumerate(facts))
