"""Which columns of an invoke's view each read and write is about, as far as a graph tells ahead.

A view is `[sequences, longest, *tail]`. A read whose users all name columns by a static index (`h[:, -1]`, `logits[0,
3:7]`, and in-place code such as `h[:, -1] += v`) is *narrowed*: it gives those columns only, and the indexings are
rewritten to the narrow view. So a patch of one token moves one row, and the head runs on the columns that somebody
reads. A write is about the columns that in-place code changed since its read; others it hands back as they were.

Invariant: after rewriting, every indexing gives what it gave on the full view.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from polytrace.graph import LEAVES, Constant, Graph, Invoke, Node, NodeId, Op, Operand, Read, Ref, Request, Write
from polytrace.tensors import RawTensor, num_bytes
from scheduling.checks import Resolved
from scheduling.plan import ValueFacts

Facts = tuple[ValueFacts | None, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Cells of a view: the columns of the sequences."""

    sequences: range | frozenset[int] | None  # None: all; each sequence asks whether it is one of them
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What a write changes of what its site had: its value was made of `base` by in-place code on some cells."""

    base: NodeId  # a read of the site, or the value of the write before
    parts: tuple[Part, ...]  # in the order of the code


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What is known of a graph's reads and writes, and the graph and facts rewritten to the narrow views."""

    narrowed: Mapping[NodeId, tuple[int, ...]]  # reads and writes -> columns of their view, ascending
    changed: Mapping[NodeId, Change]  # writes -> what they change; absent: any cell
    graph: Graph
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexing:
    """A use of a narrow value that names its columns."""

    node: int
    step: int | None  # the step of a `set_view` that does, None for the node's own index
    place: int  # of the column's part in the index
    columns: range | tuple[int, ...]


@dataclass(slots=True)
class _Chain:
    """A read, the values that in-place code made of it, and where they go back to."""

    read: int
    indexings: list[Indexing]
    column_dims: dict[int, int]  # values that have the column dimension -> which of theirs it is
    writes: list[int]


def find_columns(request: Request, resolved: Resolved, live: list[bool], facts: Facts) -> Columns:
    """Works a checked request out. Linear in its nodes."""
    graph, invokes = request.graph, request.invokes
    finder = _Finder(request, resolved, live, facts)
    narrowed: dict[NodeId, tuple[int, ...]] = {}
    rewritten: dict[int, Node] = {}
    compact: dict[int, ValueFacts] = {}
    for node, event in enumerate(graph.nodes):
        if not live[node] or not isinstance(event, Read):
            continue
        chain = finder.chain(node)
        if chain is None:
            continue
        longest = invokes[event.invoke].longest
        columns = tuple(sorted({column for indexing in chain.indexings for column in indexing.columns}))
        columns = columns or (longest - 1,)  # empty slices only: a view is never without columns
        if len(columns) == longest:
            continue
        narrowed[NodeId(node)] = columns
        narrowed.update((NodeId(write), columns) for write in chain.writes)
        for indexing in chain.indexings:
            known = rewritten.get(indexing.node, graph.nodes[indexing.node])
            rewritten[indexing.node] = with_narrow_index(known, indexing, columns)
        for value, dim in chain.column_dims.items():
            compact[value] = _with_columns(facts[value], dim, len(columns))
    for node, entry in enumerate(resolved.sites):
        if live[node] and entry is not None and entry[1].num_columns is not None:
            narrowed[NodeId(node)] = tuple(range(entry[1].num_columns))
    return Columns(
        narrowed=narrowed,
        changed=finder.changed(),
        graph=_with_nodes(graph, rewritten),
        facts=_with_facts(facts, compact),
    )


class _Finder:
    """Follows reads to their users, and writes back to their reads."""

    def __init__(self, request: Request, resolved: Resolved, live: list[bool], facts: Facts) -> None:
        self.nodes, self.invokes, self.live, self.facts = request.graph.nodes, request.invokes, live, facts
        self._sites = resolved.sites
        self._constants = request.constants
        self._places: dict[str, list[int] | None] = {}  # constants that name places, by name
        self.users: list[list[int]] = [[] for _ in live]
        self.writes_at: dict[tuple[object, int], list[int]] = {}  # (site, invoke) -> live writes, in program order
        for node, is_live in enumerate(live):
            if is_live:
                for operand in resolved.operands[node]:
                    self.users[operand].append(node)
                event = self.nodes[node]
                if isinstance(event, Write):
                    self.writes_at.setdefault((event.site, event.invoke), []).append(node)

    def chain(self, read: int) -> _Chain | None:
        """What becomes of a read, None when somebody may look at any column of it."""
        event = self.nodes[read]
        assert isinstance(event, Read)
        if self._num_columns(read) is not None or (event.site.port.is_attended and self.invokes[event.invoke].before):
            return None
        longest = self.invokes[event.invoke].longest
        column_dim = self._column_dim(read)
        chain = _Chain(read, [], {read: column_dim}, [])
        roots = {read}  # the read's content and what in-place code made of it
        pending = [read]
        while pending:
            base = pending.pop()
            dim, edits = chain.column_dims[base], 0
            for user in self.users[base]:
                node = self.nodes[user]
                if isinstance(node, Op) and node.name == "getitem":
                    index = self._index_of(node.args[1]) if len(node.args) == 2 else ()
                    found = find_dimension(index, base, dim, self.facts) if _is_base(node, base) else None
                    if isinstance(found, Passed) and self.facts[user] is not None:
                        chain.column_dims[user] = found.dim
                        pending.append(user)
                        continue
                    if not self._name(chain, user, None, index, found, longest):
                        return None
                elif base in roots and isinstance(node, Op) and node.name in ("setitem", "set_view"):
                    edits += 1
                    if edits > 1 or not _is_base(node, base) or self.facts[user] is None:
                        return None
                    step, index, found = self._edited(node, base, column_dim)
                    if not self._name(chain, user, step, index, found, longest):
                        return None
                    chain.column_dims[user] = column_dim
                    roots.add(user)
                    pending.append(user)
                elif base in roots and isinstance(node, Write) and self._goes_back(node, event):
                    chain.writes.append(user)
                else:
                    return None
        return chain if self._is_alone(chain, event) else None

    def changed(self) -> dict[NodeId, Change]:
        """Per live write whose value is what its site has, with some cells changed: those cells."""
        found: dict[NodeId, Change] = {}
        for writes in self.writes_at.values():
            before: NodeId | None = None  # the write before at the site
            for write in map(NodeId, writes):
                change = self._change(write, before, found)
                if change is not None:
                    found[write] = change
                before = write
        return found

    def _change(self, write: NodeId, before: NodeId | None, found: Mapping[NodeId, Change]) -> Change | None:
        """What a write changes of what the write before left, None when that may be any cell.

        Its value must have come, by in-place code, from what the write before wrote, or from a read behind that.
        """
        event = self.nodes[write]
        assert isinstance(event, Write)
        earlier = None if before is None else self.nodes[before]
        parts: list[Part] = []
        node = event.value.node
        while True:
            if isinstance(earlier, Write) and before in found and node == earlier.value.node:
                return Change(node, tuple(reversed(parts)))
            made = self.nodes[node]
            if isinstance(made, Read):
                is_fresh = self._goes_back(event, made) and (before is None or before < node)
                return Change(node, tuple(reversed(parts))) if is_fresh else None
            if not isinstance(made, Op) or made.name not in ("setitem", "set_view"):
                return None
            part = self._cells(made, event, self._column_dim(write)) if self._num_columns(write) is None else None
            if part is None:
                return None
            parts.append(part)
            node = NodeId(_base(made))
            if node < 0:
                return None

    def _num_columns(self, node: int) -> int | None:
        """Of a read's or a write's view, where that does not depend on the prompts."""
        entry = self._sites[node]
        assert entry is not None
        return entry[1].num_columns

    def _column_dim(self, node: int) -> int:
        """Of a read's or a write's view."""
        entry = self._sites[node]
        assert entry is not None
        return entry[1].column_dim

    def _cells(self, node: Op, write: Write, column_dim: int) -> Part | None:
        """The cells that one in-place op changes, None when that is not known ahead."""
        invoke = self.invokes[write.invoke]
        _, index, found = self._edited(node, _base(node), column_dim)
        if not isinstance(found, Named):
            return None
        columns = named_places(index[found.place], invoke.longest)
        if columns is None:
            return None
        first = index[0]
        is_sequences = found.place > 0 and first is not Ellipsis and first is not None
        rows = named_places(first, len(invoke.sequences)) if is_sequences else None
        return Part(rows if rows is None or isinstance(rows, range) else frozenset(rows), tuple(columns))

    def _edited(
        self, node: Op, base: int, column_dim: int
    ) -> tuple[int | None, tuple[Operand, ...], Passed | Named | None]:
        """Which index of an in-place op names the columns: (step of a set_view, the index, what it does)."""
        if node.name == "setitem":
            part = node.args[2] if len(node.args) == 3 else None
            is_plain = len(node.args) == 3 and not node.kwargs and not _mentions(part, base)
            index = self._index_of(node.args[1]) if is_plain else ()
            return None, index, find_dimension(index, base, column_dim, self.facts) if is_plain else None
        steps = node.args[1] if len(node.args) == 3 and not node.kwargs else None
        if not isinstance(steps, tuple) or not steps or _mentions(node.args[2], base):
            return None, (), None
        match steps[0]:
            case ("getitem", (index_operand,), ()):
                index = self._index_of(index_operand)
                return 0, index, find_dimension(index, base, column_dim, self.facts)
        return None, (), None

    def _name(
        self,
        chain: _Chain,
        user: int,
        step: int | None,
        index: tuple[Operand, ...],
        found: Passed | Named | None,
        longest: int,
    ) -> bool:
        """Notes a use that names its columns; False when it does not."""
        columns = named_places(index[found.place], longest) if isinstance(found, Named) else None
        if columns is None or not isinstance(found, Named):
            return False
        chain.indexings.append(Indexing(node=user, step=step, place=found.place, columns=columns))
        return True

    def _index_of(self, operand: Operand) -> tuple[Operand, ...]:
        """The parts of an index; a constant that holds a few places stands as the list of them."""
        parts = operand if isinstance(operand, tuple) else (operand,)
        for part in parts:
            if type(part) is Ref:
                return tuple([self._placed(part) if isinstance(part, Ref) else part for part in parts])
        return parts

    def _placed(self, part: Ref) -> Operand:
        event = self.nodes[part.node]
        if not isinstance(event, Constant):
            return part
        if event.name not in self._places:
            self._places[event.name] = _places(self._constants[event.name])
        places = self._places[event.name]
        return part if places is None else list(places)

    def _goes_back(self, write: Write, read: Read) -> bool:
        return write.site == read.site and write.invoke == read.invoke

    def _is_alone(self, chain: _Chain, event: Read) -> bool:
        """Whether no other write acts at the site between the read and the last write of its own content."""
        last = max(chain.writes, default=chain.read)
        own = set(chain.writes)
        writes = self.writes_at.get((event.site, event.invoke), [])
        return all(write in own for write in writes[bisect_right(writes, chain.read) : bisect_left(writes, last)])


@dataclass(frozen=True, slots=True)
class Passed:
    """An indexing that leaves the columns alone: they are this dimension of its result."""

    dim: int


@dataclass(frozen=True, slots=True)
class Named:
    """An indexing with a part for the columns, at this place."""

    place: int


def _is_base(node: Op, base: int) -> bool:
    """Whether the op indexes this value, and the value is nothing else to it."""
    first = node.args[0]
    is_first = type(first) is Ref and first.node == base and len(node.args) >= 2 and not node.kwargs
    return is_first and not _mentions(node.args[1], base)


def _mentions(operand: Operand, node: int) -> bool:
    """Whether an operand refers to a node."""
    kind = type(operand)
    if kind in LEAVES:
        return False
    if isinstance(operand, Ref):
        return operand.node == node
    if isinstance(operand, slice):
        return operand != _EVERY and _mentions((operand.start, operand.stop, operand.step), node)
    if isinstance(operand, (tuple, list)):
        for part in operand:
            if type(part) not in LEAVES and _mentions(part, node):
                return True
    return False


def find_dimension(index: tuple[Operand, ...], base: int, column_dim: int, facts: Facts) -> Passed | Named | None:
    """What an index does to the column dimension of its base, None when that is not known ahead."""
    base_facts = facts[base]
    if base_facts is None:
        return None
    if column_dim < len(index) <= len(base_facts.shape) and all(type(part) in _PLAIN for part in index):
        part = index[column_dim]  # by far the most: a part for each dimension
        if type(part) is int or part != _EVERY:
            return Named(column_dim)
        return Passed(sum([type(part) is slice for part in index[:column_dim]]))
    known: list[int] = []
    num_ellipses, has_advanced = 0, False  # advanced indices reorder dimensions
    for part in index:
        width = _width(part, facts)
        if width is None:
            return None
        known.append(width)
        num_ellipses += part is Ellipsis
        has_advanced = has_advanced or type(part) is list or type(part) is Ref
    rest = len(base_facts.shape) - sum(known)
    if num_ellipses > 1 or rest < 0:
        return None
    dim = result_dim = 0
    for place, (part, width) in enumerate(zip(index, known, strict=True)):
        consumed = rest if part is Ellipsis else width
        if dim <= column_dim < dim + consumed:
            if part is not Ellipsis and not (type(part) is slice and part == _EVERY):
                return Named(place)
            break
        dim += consumed
        result_dim += consumed if part is Ellipsis or isinstance(part, slice) else part is None
    return None if has_advanced else Passed(result_dim + column_dim - dim)


_EVERY = slice(None)
_PLAIN = frozenset({int, slice})


def _width(part: Operand, facts: Facts) -> int | None:
    """Dimensions that a part of an index consumes (0 for an ellipsis), None when that is not known ahead."""
    if type(part) is int or type(part) is slice:
        return 1
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Ref):
        index = facts[part.node]
        if index is None:
            return None
        return (len(index.shape) or None) if index.dtype == "bool" else 1
    return 1 if isinstance(part, list) and all(type(entry) is int for entry in part) else None


_BOUNDS = frozenset({type(None), int})


def named_places(part: Operand, longest: int) -> range | tuple[int, ...] | None:
    """The places that a static part names; for a slice with a step, those between as well."""
    if type(part) is int:
        column = part + longest if part < 0 else part
        return (column,) if 0 <= column < longest else None
    if isinstance(part, list):
        columns = tuple(_place(entry, longest) for entry in part)
        return columns if all(0 <= column < longest for column in columns) else None
    if isinstance(part, slice):
        if not (type(part.start) in _BOUNDS and type(part.stop) in _BOUNDS and type(part.step) in _BOUNDS):
            return None
        if part.step is not None and part.step < 1:
            return None
        found = range(*part.indices(longest))
        return range(found[0], found[-1] + 1) if found else ()
    return None


def _place(entry: object, longest: int) -> int:
    assert isinstance(entry, int)
    return entry + longest if entry < 0 else entry


def with_narrow_index(node: Node, indexing: Indexing, columns: tuple[int, ...]) -> Op:
    """The indexing on the narrow view."""
    assert isinstance(node, Op)
    if indexing.step is None:
        own: tuple[Operand, ...] = (node.args[0], _narrow(node.args[1], indexing, columns), *node.args[2:])
        return Op(name=node.name, args=own, kwargs=node.kwargs, where=node.where)
    steps = node.args[1]
    assert isinstance(steps, tuple)
    step = steps[indexing.step]
    assert isinstance(step, tuple)
    name, args, kwargs = step
    assert isinstance(args, tuple)
    narrow: Operand = (name, (_narrow(args[0], indexing, columns),), kwargs)
    changed: Operand = (*steps[: indexing.step], narrow, *steps[indexing.step + 1 :])
    return Op(name=node.name, args=(node.args[0], changed, *node.args[2:]), kwargs=node.kwargs, where=node.where)


def _narrow(index: Operand, indexing: Indexing, columns: tuple[int, ...]) -> Operand:
    parts: list[Operand] = list(index) if isinstance(index, tuple) else [index]
    part, named = parts[indexing.place], indexing.columns
    if isinstance(part, slice):
        first = bisect_left(columns, named[0]) if named else 0
        parts[indexing.place] = slice(first, first + len(named), part.step)
    else:
        places: list[Operand] = [bisect_left(columns, column) for column in named]
        parts[indexing.place] = places[0] if type(part) is int else places
    return tuple(parts) if isinstance(index, tuple) else parts[0]


_MAX_PLACES = 4096  # of a constant that is looked into


def _places(raw: RawTensor) -> list[int] | None:
    """The integers of a short list, None when the tensor is anything else."""
    if raw.dtype != "int64" or len(raw.shape) != 1 or raw.shape[0] > _MAX_PLACES or not raw.is_here:
        return None
    return list(memoryview(raw.data).cast("B").cast("q"))


def _base(node: Op) -> int:
    base = node.args[0] if node.args else None
    return base.node if isinstance(base, Ref) else -1


def _with_columns(facts: ValueFacts | None, dim: int, num_columns: int) -> ValueFacts:
    assert facts is not None
    shape = (*facts.shape[:dim], num_columns, *facts.shape[dim + 1 :])
    return ValueFacts(shape=shape, dtype=facts.dtype, num_bytes=num_bytes(facts.dtype, shape))


def _with_nodes(graph: Graph, changed: Mapping[int, Node]) -> Graph:
    if not changed:
        return graph
    return Graph(nodes=tuple(changed.get(position, node) for position, node in enumerate(graph.nodes)))


def _with_facts(facts: Facts, changed: Mapping[int, ValueFacts]) -> Facts:
    if not changed:
        return facts
    return tuple(changed.get(position, old) for position, old in enumerate(facts))


def columns_of(narrowed: Mapping[NodeId, tuple[int, ...]], node: int, invoke: Invoke) -> tuple[int, ...] | range:
    """The columns that a read gives or a write hands back."""
    return narrowed.get(NodeId(node)) or range(invoke.longest)
