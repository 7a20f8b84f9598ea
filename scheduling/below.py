"""What stays below the gather: nodes that each rank works out on its own part of a value that ranks split.

A value read at a split site is gathered, unless all that becomes of it is small or goes back to where it came from: a
head, a neuron, the largest logits, a sum, a product with a vector, an edit of the site. Then every rank computes on its
part, and only what is left over travels. Every rank knows from the plan what will travel and in which order.

A value is *cut* when each rank has its part of it. Only those values stay cut whose users all take parts, at the same
stage in the same pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from polytrace.graph import LEAVES, Call, Graph, NodeId, Op, Operand, Parameter, Port, Read, Ref, Write, refs
from scheduling.checks import ModelTable, Resolved
from scheduling.columns import Indexing, Named, Passed, find_dimension, named_places, with_narrow_index
from scheduling.placement import PURE, Scale
from scheduling.plan import Action, Below, Cut, ValueFacts

Facts = tuple[ValueFacts | None, ...]
Cuts = dict[NodeId, Cut]  # operands that are cut

# Element by element, of one operand and of two.
_ALONE = frozenset(
    {
        "abs",
        "neg",
        "exp",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "sign",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "erf",
        "clamp",
        "round",
        "floor",
        "ceil",
        "relu",
        "gelu",
        "silu",
        "softplus",
        "nan_to_num",
        "isfinite",
        "isinf",
        "isnan",
        "bitwise_not",
        "logical_not",
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "long",
        "int",
        "bool",
        "clone",
        "contiguous",
        "detach",
    }
)
_PAIRED = frozenset(
    {
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "rdiv",
        "pow",
        "rpow",
        "floor_divide",
        "remainder",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "maximum",
        "minimum",
    }
)
_ACROSS = {
    "sum": Action.SUM,
    "mean": Action.SUM,
    "amax": Action.EXTREME,
    "amin": Action.EXTREME,
    "max": Action.LARGEST,
    "min": Action.LARGEST,
    "argmax": Action.LARGEST,
    "argmin": Action.LARGEST,
    "topk": Action.LARGEST,
    "softmax": Action.SOFTMAX,
    "log_softmax": Action.SOFTMAX,
    "logsumexp": Action.SOFTMAX,
}
_OVER_SEVERAL = frozenset({Action.SUM, Action.EXTREME})


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """What stays below the gather, and the graph with indices into parts rewritten."""

    below: Mapping[NodeId, Below]
    graph: Graph


def lower(
    graph: Graph,
    facts: Facts,
    resolved: Resolved,
    live: Sequence[bool],
    points: Sequence[int],
    scale: Scale,
    table: ModelTable,
    holds: Collection[int] = (),
) -> Lowered:
    """Works it out for a placed graph; what is held is whole. Linear in its nodes."""
    if table.description.ranks == 1:
        return Lowered(below={}, graph=graph)
    lowering = _Lowering(graph, facts, resolved, live, points, scale, table)
    kept = lowering.kept(holds)
    below: dict[NodeId, Below] = {}
    cuts: Cuts = {}
    nodes = list(graph.nodes)
    for node in lowering.touched:
        found = lowering.action(
            node, {operand: cuts[operand] for operand in resolved.operands[node] if operand in cuts}
        )
        if found is None:
            continue
        if found.result is not None and node not in kept:
            assert not any(operand in cuts for operand in resolved.operands[node]), "a cut value's users take parts"
            continue
        below[NodeId(node)] = found
        if found.result is not None:
            cuts[NodeId(node)] = found.result
        event = nodes[node]
        if found.action is Action.PICK and isinstance(event, Op):
            nodes[node] = with_narrow_index(event, lowering.picks[node], found.features)
    return Lowered(below=below, graph=Graph(nodes=tuple(nodes)) if below else graph)


class _Lowering:
    """One graph's values that may stay cut."""

    def __init__(
        self,
        graph: Graph,
        facts: Facts,
        resolved: Resolved,
        live: Sequence[bool],
        points: Sequence[int],
        scale: Scale,
        table: ModelTable,
    ) -> None:
        self.nodes, self.facts, self.resolved, self.points, self.scale = graph.nodes, facts, resolved, points, scale
        self.table = table
        self.picks: dict[int, Indexing] = {}
        self.touched: list[int] = []  # nodes that may take parts, in order
        self._live = live
        self._users: dict[int, list[int]] = {}  # of values that may be cut
        self._last_read: dict[tuple[object, int], int] = {}  # (site, invoke) -> its last live read
        self._first_write: dict[tuple[object, int], int] = {}
        for node, event in enumerate(self.nodes):
            if live[node] and isinstance(event, Read):
                self._last_read[event.site, event.invoke] = node
            elif live[node] and isinstance(event, Write):
                self._first_write.setdefault((event.site, event.invoke), node)

    def kept(self, holds: Collection[int]) -> set[int]:
        """Values that stay cut: none of those that are held."""
        may: Cuts = {}
        steps: dict[int, Below] = {}
        for node, event in enumerate(self.nodes):
            if not self._live[node]:
                continue
            cuts = {operand: may[operand] for operand in self.resolved.operands[node] if operand in may}
            for operand in cuts:
                self._users[operand].append(node)
            if not cuts and not isinstance(event, (Read, Call, Parameter)):
                continue
            found = self.action(node, cuts)
            if found is not None:
                steps[node] = found
                self.touched.append(node)
                if found.result is not None:
                    may[NodeId(node)] = found.result
                    self._users[node] = []
        kept: set[int] = set()
        for node in reversed(list(may)):
            users = self._users[node]
            is_free = users and node not in holds
            if is_free and all(
                self._takes(user, steps.get(user), kept) and self._is_beside(node, user) for user in users
            ):
                kept.add(node)
        return kept

    def _takes(self, user: int, step: Below | None, kept: set[int]) -> bool:
        return step is not None and (step.result is None or user in kept)

    def _is_beside(self, node: int, user: int) -> bool:
        """Whether both run at one stage in one pass."""
        here, there = self.points[node], self.points[user]
        return PURE not in (here, there) and here // self.scale.width == there // self.scale.width

    def action(self, node: int, cuts: Cuts) -> Below | None:
        """What a node does when these of its operands are cut; None when it needs all of them whole."""
        event = self.nodes[node]
        if isinstance(event, Op):
            return self._op(node, event, cuts) if cuts else None
        if isinstance(event, Write):
            return self._write(node, event, cuts) if cuts else None
        cut = None if cuts else self._source(node, event)
        return None if cut is None else Below(action=Action.KEEP, cut=cut, result=cut)

    def _source(self, node: int, event: object) -> Cut | None:
        known = self.facts[node]
        if known is None:
            return None
        if isinstance(event, Read):
            entry = self.resolved.sites[node]
            assert entry is not None
            leaf = entry[1]
            is_behind = self._first_write.get((event.site, event.invoke), node) < node  # it sees whole values written
            if leaf.sharded_view_dim is None or leaf.sharded_copies > 1 or is_behind:
                return None
            return Cut(dim=leaf.sharded_view_dim, size=known.shape[leaf.sharded_view_dim], blocks=leaf.sharded_blocks)
        if isinstance(event, Parameter):
            info = self.table.parameters[event.path]
            if info.sharded_dim is None or info.sharded_copies > 1:
                return None
            return Cut(dim=info.sharded_dim, size=known.shape[info.sharded_dim], blocks=info.sharded_blocks)
        if isinstance(event, Call):
            split = split_output(event.module, self.table)
            dim = len(known.shape) - 1
            if split is None or split[1] > 1:
                return None
            return Cut(dim=dim, size=known.shape[dim], blocks=split[0])
        return None

    def _write(self, node: int, event: Write, cuts: Cuts) -> Below | None:
        """Parts go back to where they came from, when nobody reads the site behind the write."""
        entry = self.resolved.sites[node]
        assert entry is not None
        leaf, cut = entry[1], cuts[event.value.node]
        same = (leaf.sharded_view_dim, leaf.sharded_blocks, leaf.sharded_copies) == (cut.dim, cut.blocks, 1)
        is_last = self._last_read.get((event.site, event.invoke), -1) < node
        return Below(action=Action.KEEP, cut=cut, result=None) if same and is_last and not leaf.of_pairs else None

    def _op(self, node: int, op: Op, cuts: Cuts) -> Below | None:
        if op.name in ("getitem", "setitem"):
            return self._indexed(node, op, cuts)
        first = op.args[0] if op.args else None
        plain = {name: value for name, value in op.kwargs.items() if type(value) in LEAVES or isinstance(value, tuple)}
        if not isinstance(first, Ref) or len(plain) < len(op.kwargs) or any(map(refs, plain.values())):
            second = op.args[1] if len(op.args) == 2 else None
            is_reflected = op.name in _PAIRED and isinstance(second, Ref) and not op.kwargs
            return self._paired(op, cuts) if is_reflected else None
        rest = op.args[1:]
        if not any(map(refs, rest)):
            cut = cuts[first.node]
            if op.name in _ACROSS:
                return self._across(op, cut)
            return Below(action=Action.KEEP, cut=cut, result=cut) if op.name in _ALONE | _PAIRED else None
        if op.name == "matmul" and len(op.args) == 2 and not op.kwargs:
            return self._product(op, cuts)
        return self._paired(op, cuts) if op.name in _PAIRED and len(op.args) == 2 else None

    def _across(self, op: Op, cut: Cut) -> Below | None:
        """A reduction, when it is over the cut dimension and what it does is known ahead."""
        step = _ACROSS[op.name]
        where = 2 if op.name == "topk" else 1
        dim = op.args[where] if len(op.args) > where else op.kwargs.get("dim", -1 if op.name == "topk" else None)
        base = self.facts[_node(op.args[0])]
        named = dim if isinstance(dim, tuple) else (dim,)
        if base is None or not all(type(one) is int for one in named) or "dtype" in op.kwargs:
            return None
        ndim = len(base.shape)
        dims = tuple(one % ndim for one in named if isinstance(one, int))
        if cut.dim not in dims or (len(dims) > 1 and step not in _OVER_SEVERAL):
            return None
        most = {"topk": 5, "softmax": 2, "log_softmax": 2}.get(op.name, 3)
        if len(op.args) > most:
            return None
        stays = op.name in ("softmax", "log_softmax")
        return Below(action=step, cut=cut, result=cut if stays else None, dims=dims)

    def _product(self, op: Op, cuts: Cuts) -> Below | None:
        """A product of the cut last dimension with a whole vector or matrix."""
        left, right = map(_node, op.args)
        base, other = self.facts[left], self.facts[right]
        if left not in cuts or right in cuts or base is None or other is None or len(other.shape) > 2:
            return None
        if cuts[left].dim != len(base.shape) - 1:
            return None
        return Below(action=Action.PRODUCT, cut=cuts[left], result=None, parts=((1, 0),))

    def _paired(self, op: Op, cuts: Cuts) -> Below | None:
        """Element by element, of two operands that broadcast."""
        shapes = {place: self._shape(operand) for place, operand in enumerate(op.args)}
        if any(shape is None for shape in shapes.values()):
            return None
        ndim = max(len(shape) for shape in shapes.values() if shape is not None)
        found: Cut | None = None
        parts = []
        for place, operand in enumerate(op.args):
            if isinstance(operand, Ref) and operand.node in cuts:
                cut, shape = cuts[operand.node], shapes[place]
                assert shape is not None
                here = replace(cut, dim=cut.dim + ndim - len(shape))
                if found is not None and found != here:
                    return None
                found = here
        assert found is not None
        for place, operand in enumerate(op.args):
            shape = shapes[place]
            assert shape is not None
            dim = found.dim - (ndim - len(shape))
            if isinstance(operand, Ref) and operand.node in cuts:
                continue
            if dim >= 0 and shape[dim] == found.size:
                parts.append((place, dim))
            elif dim >= 0 and shape[dim] != 1:
                return None
        return Below(action=Action.KEEP, cut=found, result=found, parts=tuple(parts))

    def _shape(self, operand: Operand) -> tuple[int, ...] | None:
        if isinstance(operand, Ref):
            known = self.facts[operand.node]
            return None if known is None else known.shape
        return () if type(operand) in LEAVES else None

    def _indexed(self, node: int, op: Op, cuts: Cuts) -> Below | None:
        base = _node(op.args[0])
        known = self.facts[base]
        if base not in cuts or op.kwargs or known is None or self.facts[node] is None:
            return None
        cut, index = cuts[base], op.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if any(operand in cuts for operand in refs(index)):
            return None
        found = find_dimension(parts, base, cut.dim, self.facts)
        features = named_places(parts[found.place], cut.size) if isinstance(found, Named) else None
        if op.name == "getitem":
            if isinstance(found, Passed):
                return Below(action=Action.KEEP, cut=cut, result=replace(cut, dim=found.dim))
            if not isinstance(found, Named) or not features:
                return None
            chosen = tuple(sorted(set(features)))
            self.picks[node] = Indexing(node=node, step=None, place=found.place, columns=features)
            return Below(action=Action.PICK, cut=cut, result=None, features=chosen)
        value = op.args[2] if len(op.args) == 3 else None
        if isinstance(found, Passed):
            ndim = len(known.shape) + sum((part is None) - (type(part) is int) for part in parts)
            return self._put_everywhere(cut, replace(cut, dim=found.dim), ndim, value, cuts)
        if not isinstance(found, Named) or features is None:
            return None
        part = parts[found.place]
        is_whole = isinstance(value, Ref) and value.node not in cuts
        is_alike = type(value) in (int, float, bool) or (is_whole and type(part) is int)
        is_simple = type(part) is int or (isinstance(part, slice) and part.step in (None, 1))
        is_only = isinstance(part, list) and not any(isinstance(one, list) for one in parts if one is not part)
        if not is_alike or any(map(refs, parts)) or not (is_simple or is_only):
            return None
        return Below(action=Action.PUT, cut=cut, result=cut, features=tuple(features), place=found.place)

    def _put_everywhere(self, cut: Cut, seen: Cut, ndim: int, value: Operand, cuts: Cuts) -> Below | None:
        """In-place code that leaves the cut dimension alone: `seen` is that of what the index gives, of `ndim`."""
        shape = self._shape(value)
        if shape is None or len(shape) > ndim:
            return None
        dim = seen.dim - (ndim - len(shape))
        if isinstance(value, Ref) and value.node in cuts:
            return (
                Below(action=Action.KEEP, cut=cut, result=cut) if cuts[value.node] == replace(seen, dim=dim) else None
            )
        if dim >= 0 and shape[dim] == cut.size:
            return Below(action=Action.KEEP, cut=cut, result=cut, parts=((2, dim),))
        return Below(action=Action.KEEP, cut=cut, result=cut) if dim < 0 or shape[dim] == 1 else None


def split_output(module: str, table: ModelTable) -> tuple[int, int] | None:
    """Blocks and copies of a called module's output whose last dimension ranks split; None when each has all of it."""
    leaf = _leaf(module, Port.OUTPUT, table)
    if leaf is None or leaf[0] is None or split_input(module, table) is not None:
        return None
    return leaf[1], leaf[2]


def split_input(module: str, table: ModelTable) -> int | None:
    """The blocks of a called module's input whose last dimension its ranks split; None when it takes all of it."""
    leaf = _leaf(module, Port.INPUT, table)
    return None if leaf is None or leaf[0] is None else leaf[1]


def _leaf(module: str, port: Port, table: ModelTable) -> tuple[int | None, int, int] | None:
    """Of the one tensor of a module's side with one dimension of features: how that is split."""
    visits = table.sites.get((module, port), [])
    if len(visits) != 1 or visits[0].structure != "tensor" or len(visits[0].leaves[0].tail) != 1:
        return None
    leaf = visits[0].leaves[0]
    if leaf.row_dim != 1:
        return None
    return leaf.sharded_dim, leaf.sharded_blocks, leaf.sharded_copies


def _node(operand: Operand) -> NodeId:
    assert isinstance(operand, Ref)
    return operand.node
