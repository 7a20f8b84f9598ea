"""Shape and dtype of every value of a graph before anything runs, on the meta device: no data, no memory.

Owns the walk over a request's nodes, the refusal of what does not fit (a GraphError with the user's line and torch's
own reason) and of what is too large. torch decides every shape (`engine.meta`); names were looked up by
`scheduling.checks`; pad rows are `engine.ragged`'s business.

Invariants
- A shape that depends on values is refused, unless the values are known at submit (`engine.known`).
- A value's size is checked against the limits before the next node is looked at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine.indexing import DependsOnValues, normalise
from engine.known import KnownValues
from engine.meta import MISFITS, Frozen, Meta, OneDtype, contiguous, freeze, meta_of, result_of, tensor_of
from engine.ops import DTYPE_NAMES, TORCH_DTYPES
from engine.ragged import TokenDimensions
from engine.refusals import VALUES_HINT, check_depth, explain, title
from polytrace.description import ModelDescription, Rows
from polytrace.errors import GraphError, PolytraceError, TooLargeError
from polytrace.graph import Call, Constant, Mask, Node, NodeId, Op, Operand, Parameter, Read, Ref, Request, Write
from polytrace.ops import OPS, Results
from scheduling.checks import Resolved, resolve, table_of
from scheduling.plan import ValueFacts

_MAX_PARTS = 4_096  # values that split, chunk or unbind may return


def infer(description: ModelDescription, request: Request, meta: nn.Module) -> tuple[ValueFacts | None, ...]:
    """Shape, dtype and bytes of each node's value; None for writes, saves and calls that return several values.

    `meta` is the whole model on the meta device (`engine.loading.meta_model`). Raises GraphError where the program
    cannot be honoured and TooLargeError where it exceeds a limit, with the user's line. Takes memory for no value.
    """
    for node in request.graph.nodes:
        if isinstance(node, (Op, Call)):
            check_depth(node)
    names = resolve(request, table_of(description))
    walk = _Walk(description, request, meta, names)
    with torch.no_grad():
        for position, node in enumerate(request.graph.nodes):
            walk.visit(NodeId(position), node)
    return tuple(walk.facts)


def warm_up() -> None:
    """Loads torch's shape rules: 1.7 s, once a process, that the first request would wait for."""
    _ = torch.empty(1, device="meta") + 1


class _Walk:
    """One request on its way through its nodes, in the user's order."""

    def __init__(
        self,
        description: ModelDescription,
        request: Request,
        meta: nn.Module,
        names: Resolved,
    ) -> None:
        self.limits = description.limits
        self.request = request
        self.meta = meta
        self.sites = names.sites
        self.needs = names.operands
        self.parameters = {info.path: info for info in description.parameters}
        self.values: list[Meta | tuple[Meta, ...] | None] = []  # per node; a tuple for several values
        self.facts: list[ValueFacts | None] = []
        self.live_bytes = 0
        self.known = KnownValues(request, names.operands)
        self.tokens = TokenDimensions(request, names.operands)
        self.uncounted = _compacted(request, names) if description.has_kept_rows else frozenset()
        self.calls: dict[tuple[str, tuple[Frozen, ...]], Meta] = {}

    def visit(self, position: NodeId, node: Node) -> None:
        """Appends the node's value and facts."""
        try:
            value = self._value(position, node)
        except PolytraceError as error:
            if error.where is None:
                error.where = node.where
            raise
        except DependsOnValues:
            raise GraphError(f"{title(node)}: {VALUES_HINT}", where=node.where) from None
        except MISFITS as error:
            raise GraphError(
                explain(node, error, [self.values[part] for part in self.needs[position]]), where=node.where
            ) from None
        self.values.append(value)
        self.facts.append(_facts(value) if isinstance(value, Meta) else None)
        self.known.note(position, self._count(position, node, value) if value is not None else 0)

    def _value(self, position: NodeId, node: Node) -> Meta | tuple[Meta, ...] | None:
        if isinstance(node, Op):
            return self._op(position, node)
        if isinstance(node, Read):
            shape = self._view(position, node)
            self.tokens.read(position, node.invoke, shape)
            return shape
        if isinstance(node, Mask):
            prompts = self.request.invokes[node.invoke]
            shape = contiguous((len(prompts.sequences), prompts.longest), torch.bool)
            self.tokens.mask(position, node.invoke, shape)
            return shape
        if isinstance(node, Constant):
            raw = self.request.constants[node.name]
            return contiguous(raw.shape, TORCH_DTYPES[raw.dtype])
        if isinstance(node, Parameter):
            info = self.parameters[node.path]
            return contiguous(info.shape, TORCH_DTYPES[info.dtype])
        if isinstance(node, Call):
            return self._call(position, node)
        if isinstance(node, Write):
            self._check_write(position, node)
        elif not isinstance(self.values[node.value.node], Meta):
            raise GraphError(f"{node.name!r} would save several values: take one of them")
        return None

    def _view(self, position: NodeId, node: Read | Write) -> Meta:
        """The site as the request sees it."""
        entry = self.sites[position]
        assert entry is not None
        prompts, leaf = self.request.invokes[node.invoke], entry[1]
        return contiguous((len(prompts.sequences), prompts.longest, *leaf.tail), TORCH_DTYPES[leaf.dtype])

    def _check_write(self, position: NodeId, node: Write) -> None:
        view, value = self._view(position, node), self.values[node.value.node]
        if not isinstance(value, Meta):
            raise GraphError(f"the value written to {node.site} is several values: take one of them")
        if value.shape != view.shape:
            raise GraphError(
                f"{node.site} has shape {list(view.shape)} and the value written to it {list(value.shape)}; "
                "a write needs the exact shape"
            )

    def _op(self, position: NodeId, node: Op) -> Meta | tuple[Meta, ...]:
        args, value = self._op_value(node)
        is_several = OPS[node.name].results is not Results.ONE
        if not isinstance(value, Meta) and not is_several:
            raise DependsOnValues  # torch.where(condition) alone: as many values as are True
        self.tokens.op(position, node, args, self.values, value)
        return value

    def _op_value(self, node: Op) -> tuple[tuple[Any, ...], Meta | tuple[Meta, ...]]:
        """The op's arguments, free of what needs data, and its value."""
        args: tuple[Any, ...] = node.args
        if node.name == "item":
            return args, self._item(node)
        if node.name == "getitem":
            args = (args[0], normalise(self._one(args[0]), args[1], self.values, self.known.data))
        elif node.name == "setitem":
            return self._setitem(node)
        elif node.name == "set_view":
            args = (args[0], self._steps(self._one(args[0]), args[1]), args[2])
        elif node.name == "repeat_interleave":
            return args, self._repeat_interleave(node)
        elif node.name == "one_hot" and len(args) == 1 and not node.kwargs:
            indices = self.known.data(args[0].node) if isinstance(args[0], Ref) else None
            if indices is None:
                raise GraphError("one_hot of a recorded value needs num_classes: its shape depends on values")
            args = (*args, int(indices.max()) + 1)
        elif OPS[node.name].results is Results.LIST:
            self._check_parts(node)
        return args, self._result(node, args)

    def _result(self, node: Op, args: tuple[Any, ...]) -> Meta | tuple[Meta, ...]:
        frozen = tuple([freeze(argument, self.values) for argument in args])
        kwargs = tuple([(key, freeze(argument, self.values)) for key, argument in node.kwargs.items()])
        return result_of(node.name, frozen, kwargs)

    def _one(self, operand: Operand) -> Meta:
        value = self.values[operand.node] if isinstance(operand, Ref) else None
        if not isinstance(value, Meta):
            raise TypeError("the first operand is one recorded value")
        return value

    def _item(self, node: Op) -> Meta:
        several, place = node.args
        members = self.values[several.node] if isinstance(several, Ref) else None
        if not isinstance(members, tuple) or isinstance(members, Meta) or not isinstance(place, int):
            raise TypeError("item takes one of several values, by its position")
        if not 0 <= place < len(members):
            raise IndexError(f"there are {len(members)} values; number {place} is not one of them")
        member: Meta = members[place]
        return member

    def _setitem(self, node: Op) -> tuple[tuple[Any, ...], Meta | tuple[Meta, ...]]:
        base = self._one(node.args[0])
        try:
            return self._assigned(node, base, None)
        except DependsOnValues:
            # An unknown mask selects some number of places: what fits two numbers that share no factor fits all.
            try:
                self._assigned(node, base, 2)
                return self._assigned(node, base, 3)
            except MISFITS:
                raise DependsOnValues from None

    def _assigned(
        self, node: Op, base: Meta, unknown_count: int | None
    ) -> tuple[tuple[Any, ...], Meta | tuple[Meta, ...]]:
        """The assignment, with an index that needs no data. The meta device does not hold the new part to the old."""
        index = normalise(base, node.args[1], self.values, self.known.data, unknown_count=unknown_count)
        part = result_of("getitem", (base, freeze(index, self.values)), ())
        value = freeze(node.args[2], self.values)
        assert isinstance(part, Meta)
        if isinstance(value, Meta) and not _fits(value.shape, part.shape):
            raise ValueError(f"the value's shape {list(value.shape)} does not fit the part's {list(part.shape)}")
        args = (node.args[0], index, *node.args[2:])
        return args, self._result(node, args)

    def _steps(self, base: Meta, steps: Any) -> Any:
        """View steps with their indices free of what needs data."""
        view: Any = base
        found: list[Any] = []
        for name, args, kwargs in steps:
            if name == "getitem":
                args = (normalise(view, args[0], self.values, self.known.data),)
            found.append((name, args, kwargs))
            if name == "item":
                view = view[args[0]]
            elif name in OPS and OPS[name].is_view:
                frozen = tuple([freeze(argument, self.values) for argument in args])
                view = result_of(
                    name, (view, *frozen), tuple([(key, freeze(part, self.values)) for key, part in kwargs])
                )
        return tuple(found)

    def _repeat_interleave(self, node: Op) -> Meta | tuple[Meta, ...]:
        repeats = node.kwargs.get("repeats", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(repeats, Ref):
            return self._result(node, node.args)
        counts = self.known.data(repeats.node)
        if counts is None:
            raise DependsOnValues
        base = self._one(node.args[0])
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        shape = list(base.shape) if dim is not None else [math.prod(base.shape)]
        if dim is not None and not isinstance(dim, int):
            raise TypeError("dim is a number")
        place = dim or 0
        if counts.dim() > 1 or (counts.numel() not in (1, shape[place])) or int(counts.min()) < 0:
            raise ValueError("repeats needs one count, 0 or more, for each place of the dimension")
        shape[place] = int(counts.sum()) if counts.numel() != 1 else int(counts) * shape[place]
        return contiguous(tuple(shape), base.dtype)

    def _check_parts(self, node: Op) -> None:
        """A list of values must be short before torch makes it."""
        base = self._one(node.args[0])
        place = 1 if node.name == "unbind" else 2
        dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
        sizes = {key: value for key, value in node.kwargs.items() if key != "dim"}
        size = next(iter(sizes.values()), node.args[1] if len(node.args) > 1 else 1)
        length = base.shape[dim] if isinstance(dim, int) and base.shape else 0
        parts = length
        if node.name == "split" and isinstance(size, int) and size > 0:
            parts = -(-length // size)
        elif node.name == "split" and isinstance(size, (tuple, list)):
            parts = len(size)
        elif node.name == "chunk" and isinstance(size, int):
            parts = min(size, length)
        if parts > _MAX_PARTS:
            raise TooLargeError(f"{node.name} would make {parts} values; the limit is {_MAX_PARTS}")

    def _call(self, position: NodeId, node: Call) -> Meta:
        frozen = tuple([freeze(argument, self.values) for argument in node.args])
        key = (node.module, frozen)
        value = self.calls.get(key)
        if value is None:
            with torch.device("meta"), OneDtype():
                returned = self.meta.get_submodule(node.module)(*[_thawed(argument) for argument in frozen])
            found = meta_of(returned)
            if not isinstance(found, Meta):
                raise GraphError(
                    f"{node.module} returns several values; only modules that return one tensor are called"
                )
            value = self.calls[key] = found
        self.tokens.call(position, node, self.values, value)
        return value

    def _count(self, position: NodeId, node: Node, value: Meta | tuple[Meta, ...]) -> int:
        """Checks the value's size against the limits. Returns its elements."""
        members = (value,) if isinstance(value, Meta) else value
        num_bytes = sum(member.num_bytes for member in members)
        num_elements = sum(math.prod(member.shape) for member in members)
        if position in self.uncounted or (isinstance(node, Op) and node.name == "item"):
            return num_elements
        if num_bytes > self.limits.max_value_bytes:
            shape = list(value.shape) if isinstance(value, Meta) else [list(member.shape) for member in members[:3]]
            raise TooLargeError(
                f"{title(node)} would make a value of {num_bytes} bytes ({shape}); the limit is "
                f"{self.limits.max_value_bytes}",
                where=node.where,
            )
        self.live_bytes += num_bytes
        if self.live_bytes > self.limits.max_live_bytes:
            raise TooLargeError(
                f"the values of the graph up to {title(node)} take {self.live_bytes} bytes; the limit is "
                f"{self.limits.max_live_bytes}",
                where=node.where,
            )
        return num_elements


def _compacted(request: Request, names: Resolved) -> frozenset[NodeId]:
    """Reads behind the head whose every use picks columns: the head runs on those only, so the picks are what costs."""
    kept = {place for place, entry in enumerate(names.sites) if entry is not None and entry[0].rows is Rows.KEPT}
    if not kept:
        return frozenset()
    users: dict[NodeId, list[Node]] = {}
    for node, parts in zip(request.graph.nodes, names.operands, strict=True):
        for part in parts:
            users.setdefault(part, []).append(node)
    found: set[NodeId] = set()
    for place, node in enumerate(request.graph.nodes):
        position = NodeId(place)
        is_read = isinstance(node, Read) and place in kept
        if isinstance(node, Op) and node.name == "getitem" and isinstance(node.args[0], Ref):
            is_read = node.args[0].node in found
        indexings = users.get(position, [])
        if is_read and indexings and all(isinstance(user, Op) and user.name == "getitem" for user in indexings):
            found.add(position)
    return frozenset(found)


def _thawed(frozen: Frozen) -> Tensor:
    if not isinstance(frozen, Meta):
        raise TypeError("a module is called with values only")
    return tensor_of(frozen)


def _fits(value: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether an assignment broadcasts the value to the part; leading dimensions of 1 may be too many."""
    while len(value) > len(part) and value[0] == 1:
        value = value[1:]
    paired = zip(reversed(value), reversed(part), strict=False)
    return len(value) <= len(part) and all(size in (1, wanted) for size, wanted in paired)


def _facts(value: Meta) -> ValueFacts:
    return ValueFacts(shape=value.shape, dtype=DTYPE_NAMES[value.dtype], num_bytes=value.num_bytes)
