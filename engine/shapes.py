"""Shape and dtype of every value of a graph before anything runs, on the meta device: no data, no memory.

Owns the walk over a request's nodes, the refusal of what does not fit (a GraphError with the user's line and torch's
own reason) and of what is too large. torch decides every shape (`engine.meta`); names were looked up by
`scheduling.checks`; pad rows are `engine.ragged`'s business.

Invariants
- A shape that depends on values is refused, unless the values are known at submit (`engine.known`).
- Structure that repeats is worked out once: same op, same operands' shapes and token dimensions, same arguments. Where
  an op may look at values it is worked out each time.
- A value's size is checked against the limits before the next node is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from engine.gradient_shapes import check_gradient, gradient_of
from engine.indexing import DependsOnValues, normalise
from engine.known import KnownValues, looks_at_data
from engine.meta import MISFITS, Frozen, Meta, OneDtype, contiguous, freeze, meta_of, result_of, tensor_of, work_of
from engine.ops import DTYPE_NAMES, TORCH_DTYPES
from engine.ragged import Members, TokenDimensions
from engine.refusals import VALUES_HINT, check_depth, explain, title
from polytrace.collector import young_only
from polytrace.description import ModelDescription, Rows
from polytrace.errors import GraphError, PolytraceError, TooLargeError
from polytrace.graph import (
    Backward,
    Call,
    Carried,
    Constant,
    DType,
    Grad,
    GradWrite,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Parameter,
    Read,
    Ref,
    Request,
    Save,
    SeedGrad,
    SiteGrad,
    Stop,
    Write,
)
from polytrace.ops import OPS, Results
from polytrace.part_counts import num_parts
from scheduling.checks import ModelTable, Resolved, resolve, table_of
from scheduling.liveness import peak_bytes
from scheduling.plan import ValueFacts

_MAX_PARTS = 4_096  # values that split, chunk or unbind may return

_WORK_BYTES = 4  # of an element that an op makes on its way

ValueNode: TypeAlias = Read | Mask | Constant | Parameter | Call | Op | Carried | Last | Grad


def infer(description: ModelDescription, request: Request, meta: nn.Module) -> tuple[ValueFacts | None, ...]:
    """Shape, dtype and bytes of each node's value; None for writes, saves and calls that return several values.

    `meta` is the whole model on the meta device (`engine.loading.meta_model`). Raises GraphError where the program
    cannot be honoured and TooLargeError where it exceeds a limit, with the user's line. Takes memory for no value.
    """
    with young_only:
        table = table_of(description)
        try:
            names = resolve(request, table)
        except RecursionError:
            for node in request.graph.nodes:
                if isinstance(node, (Op, Call)):
                    check_depth(node)
            raise
        walk = _Walk(table, request, meta, names)
        for position, node in enumerate(request.graph.nodes):
            walk.visit(NodeId(position), node)
        walk.check_total()
        return tuple([found.facts if found is not None else None for found in walk.found])


def warm_up() -> None:
    """Loads torch's shape rules: 1.7 s, once a process, that the first request would wait for."""
    _ = torch.empty(1, device="meta") + 1


class _Found:
    """What was found out about a value. Values of equal structure have one object, which stands for them in keys."""

    __slots__ = ("facts", "num_bytes", "num_elements", "tokens", "value")

    def __init__(self, value: Meta | tuple[Meta, ...], tokens: Members | None) -> None:
        members = (value,) if isinstance(value, Meta) else value
        self.value = value
        self.tokens = tokens
        self.facts = _facts(value) if isinstance(value, Meta) else None
        self.num_bytes = sum(member.num_bytes for member in members)
        self.num_elements = sum(math.prod(member.shape) for member in members)


class _Walk:
    """One request on its way through its nodes, in the user's order."""

    def __init__(self, table: ModelTable, request: Request, meta: nn.Module, names: Resolved) -> None:
        self.limits = table.description.limits
        self.request = request
        self.meta = meta
        self.names = names
        self.sites = names.sites
        self.needs = names.operands
        self.parameters = table.parameters
        self.values: list[Meta | tuple[Meta, ...] | None] = []  # per node; a tuple for several values
        self.found: list[_Found | None] = []  # per node; None for writes and saves
        self.known = KnownValues(request, names.operands)
        self.tokens = TokenDimensions(request, names.operands)
        self.total_bytes = 0  # of all values, those that do not count included
        self.uncounted = _compacted(request, names, has_kept_rows=table.description.has_kept_rows)
        self.structures: dict[Hashable, _Found] = {}  # by all that a value's shape follows from
        self.plain: dict[Meta | tuple[Meta, ...], _Found] = {}  # without token dimensions, by shape
        self.views: dict[int, tuple[int, int, int]] = {}  # of invokes, by the object's id: prompts, longest, shortest

    def visit(self, position: NodeId, node: Node) -> None:
        """Appends the node's value and facts."""
        found: _Found | None = None
        if isinstance(node, Write):
            self._check_write(position, node)
        elif isinstance(node, Save):
            saved = self.values[node.value.node]
            if not isinstance(saved, Meta):
                told = f"{node.name!r} would save several values: take one of them"
                raise GraphError(told, where=node.where)
            if saved.dtype.is_complex:
                told = "complex values do not travel: save .real and .imag, or torch.view_as_real(value)"
                raise GraphError(told, where=node.where)
        elif isinstance(node, Stop):
            self._check_stop(node)
        elif isinstance(node, (Backward, GradWrite)):
            check_gradient(node, self.values)
        elif isinstance(node, (SiteGrad, OpGrad, SeedGrad)):
            raise TypeError(f"a {type(node).__name__} is made of nodes whose shapes are known")
        else:
            structure = self._structure(position, node)
            found = self.structures.get(structure) if structure is not None else None
            if found is not None:
                self.tokens.note(position, found.tokens)
            else:
                found = self._found_of(self._checked_value(position, node), self.tokens.members(position))
                if structure is not None:
                    self.structures[structure] = found
            if found.num_bytes > self.limits.max_value_bytes:
                self._check_size(position, node, found)
            self.total_bytes += found.num_bytes
        self.found.append(found)
        self.values.append(found.value if found is not None else None)
        self.known.note(position, found.num_elements if found is not None else 0)

    def check_total(self) -> None:
        """Raises TooLargeError where the graph would hold more at once than the limit. For the end of the walk."""
        if self.total_bytes <= self.limits.max_live_bytes:
            return
        sizes = [
            found.num_bytes if found is not None and self._is_counted(NodeId(position), node) else 0
            for position, (found, node) in enumerate(zip(self.found, self.request.graph.nodes, strict=True))
        ]
        peak, place = peak_bytes(self.names, sizes)
        if peak > self.limits.max_live_bytes:
            raise TooLargeError(
                f"the graph would hold values of {peak} bytes at once; the limit is {self.limits.max_live_bytes}",
                where=self.request.graph.nodes[place].where,
            )

    def _found_of(self, value: Meta | tuple[Meta, ...], tokens: Members | None) -> _Found:
        """One object for each value that has no token dimension."""
        if tokens is not None:
            return _Found(value, tokens)
        found = self.plain.get(value)
        if found is None:
            found = self.plain[value] = _Found(value, None)
        return found

    def _structure(self, position: NodeId, node: ValueNode) -> Hashable:
        """All that the node's shape and token dimensions follow from; None where values may decide."""
        if isinstance(node, Op):
            return None if looks_at_data(node) else ("op", node.name, *self._parts(node.args), *self._named(node))
        if isinstance(node, Read):
            entry = self.sites[position]
            assert entry is not None
            leaf = entry[1]
            told = leaf.of_pairs, leaf.is_attended, leaf.row_dim, leaf.num_columns, leaf.tail, leaf.dtype
            invoke = self.request.invokes[node.invoke]
            return ("read", *told, *self._view_of(node.invoke), invoke.before, invoke.pads)
        if isinstance(node, Mask):
            return ("mask", *self._view_of(node.invoke))
        if isinstance(node, Constant):
            raw = self.request.constants[node.name]
            return ("tensor", raw.shape, raw.dtype)
        if isinstance(node, Parameter):
            info = self.parameters[node.path]
            return ("tensor", info.shape, info.dtype)
        if isinstance(node, Carried):
            return ("tensor", node.shape, node.dtype)
        if isinstance(node, Last):
            return None
        if isinstance(node, Grad):
            return ("gradient", self.found[node.of.node])
        return ("call", node.module, *self._parts(node.args))

    def _named(self, op: Op) -> tuple[Hashable, ...]:
        return ("kwargs", *op.kwargs, *self._parts(op.kwargs.values())) if op.kwargs else ()

    def _parts(self, parts: Iterable[Operand]) -> list[Hashable]:
        """Operands with what was found in the place of references. Python says 1 == 1.0 == True, and torch does not."""
        found: list[Hashable] = []
        for part in parts:
            kind = type(part)
            if isinstance(part, Ref):
                found.append(self.found[part.node])
            elif kind is int or part is None or part is Ellipsis or isinstance(part, DType):
                found.append(part)  # type: ignore[arg-type]
            elif isinstance(part, (tuple, list)):
                found.append((kind, *self._parts(part)))
            elif isinstance(part, slice):
                found.append((kind, *self._parts((part.start, part.stop, part.step))))
            else:
                found.append((kind, repr(part)))  # 0.0 == -0.0
        return found

    def _view_of(self, invoke: int) -> tuple[int, int, int]:
        """How many prompts an invoke has, the tokens of the longest and of the shortest."""
        prompts = self.request.invokes[invoke]
        view = self.views.get(id(prompts))
        if view is None:
            lengths = [len(sequence) for sequence in prompts.sequences]
            view = self.views[id(prompts)] = (len(lengths), max(lengths), min(lengths))
        return view

    def _checked_value(self, position: NodeId, node: ValueNode) -> Meta | tuple[Meta, ...]:
        """The value, worked out; what does not fit is refused in the user's terms."""
        try:
            return self._value(position, node)
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

    def _value(self, position: NodeId, node: ValueNode) -> Meta | tuple[Meta, ...]:
        if isinstance(node, Op):
            check_depth(node)
            return self._op(position, node)
        if isinstance(node, Read):
            entry = self.sites[position]
            assert entry is not None
            num_prompts, longest, _ = self._view_of(node.invoke)
            before = self.request.invokes[node.invoke].before
            shape = contiguous(entry[1].view_shape(num_prompts, longest, before=before), TORCH_DTYPES[entry[1].dtype])
            if before and (entry[1].of_pairs or entry[1].is_attended):
                self.tokens.earlier(position, node.invoke, shape, 3 if entry[1].of_pairs else 1)
            elif entry[1].num_columns is None:
                self.tokens.read(position, node.invoke, shape, (2, 3) if entry[1].of_pairs else (entry[1].row_dim,))
            return shape
        if isinstance(node, Mask):
            shape = contiguous(self._view_of(node.invoke)[:2], torch.bool)
            self.tokens.mask(position, node.invoke, shape)
            return shape
        if isinstance(node, Constant):
            raw = self.request.constants[node.name]
            return contiguous(raw.shape, TORCH_DTYPES[raw.dtype])
        if isinstance(node, Parameter):
            info = self.parameters[node.path]
            return contiguous(info.shape, TORCH_DTYPES[info.dtype])
        if isinstance(node, Carried):
            return contiguous(node.shape, TORCH_DTYPES[node.dtype])
        if isinstance(node, Last):
            return self._last(node)
        if isinstance(node, Grad):
            self.tokens.note(position, self.tokens.members(node.of.node))
            return gradient_of(self._one(node.of))
        check_depth(node)
        return self._call(position, node)

    def _last(self, node: Last) -> Meta:
        found = [self._one(value) for value in node.values]
        if any(one != found[0] for one in found):
            shapes = ", ".join(dict.fromkeys(str(list(one.shape)) for one in found))
            told = (
                f"what a loop leaves has another shape or dtype at other steps ({shapes}): use the values of each step"
            )
            raise GraphError(told, where=node.where)
        return found[0]

    def _check_stop(self, node: Stop) -> None:
        value, num_sequences = self.values[node.value.node], len(self.request.invokes[node.invoke].sequences)
        count = math.prod(value.shape) if isinstance(value, Meta) else 0
        if count not in (1, num_sequences):
            told = "several values" if not isinstance(value, Meta) else f"shape {list(value.shape)}"
            raise GraphError(
                f"tracer.stop(when=value) takes one value, or one for each of {num_sequences} sequences, not {told}",
                where=node.where,
            )

    def _check_write(self, position: NodeId, node: Write) -> None:
        entry, value = self.sites[position], self.values[node.value.node]
        assert entry is not None
        if not isinstance(value, Meta):
            told = f"the value written to {node.site} is several values: take one of them"
            raise GraphError(told, where=node.where)
        if value.dtype.is_complex:
            raise GraphError(f"{node.site} takes no complex value: write its .real or .abs()", where=node.where)
        num_prompts, longest, _ = self._view_of(node.invoke)
        planned = entry[1].view_shape(num_prompts, longest, before=self.request.invokes[node.invoke].before)
        if value.shape != planned:
            raise GraphError(
                f"{node.site} has shape {list(planned)} and the value written to it "
                f"{list(value.shape)}; a write needs the exact shape",
                where=node.where,
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
        elif OPS[node.name].needs_values:
            value = self.known.value_of(node)
            if value is None:
                raise DependsOnValues
            return args, meta_of(value)
        elif OPS[node.name].results is Results.LIST:
            self._check_parts(node)
        return args, self._result(node, args)

    def _result(self, node: Op, args: tuple[Any, ...]) -> Meta | tuple[Meta, ...]:
        frozen = tuple([freeze(argument, self.values) for argument in args])
        kwargs = tuple([(key, freeze(argument, self.values)) for key, argument in node.kwargs.items()])
        value = result_of(node.name, frozen, kwargs)
        if (work := work_of(node.name, frozen, kwargs) * _WORK_BYTES) > self.limits.max_value_bytes:
            raise TooLargeError(
                f"{node.name} would need {work} bytes while it runs; the limit is {self.limits.max_value_bytes}"
            )
        return value

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
        is_one = isinstance(node.args[0], Ref) and node.name not in ("meshgrid", "broadcast_tensors")
        parts = num_parts(node.name, node.args, node.kwargs, self._one(node.args[0]).shape if is_one else ())
        if parts > _MAX_PARTS:
            raise TooLargeError(f"{node.name} would make {parts} values; the limit is {_MAX_PARTS}")

    def _call(self, position: NodeId, node: Call) -> Meta:
        arguments = [_thawed(freeze(argument, self.values)) for argument in node.args]
        with torch.no_grad(), torch.device("meta"), OneDtype():
            value = meta_of(self.meta.get_submodule(node.module)(*arguments))
        if not isinstance(value, Meta):
            raise GraphError(f"{node.module} returns several values; only modules that return one tensor are called")
        self.tokens.call(position, node, self.values, value)
        return value

    def _is_counted(self, position: NodeId, node: Node) -> bool:
        """Whether a value takes bytes of its own."""
        is_item = isinstance(node, Op) and node.name == "item"
        return not is_item and position not in self.uncounted

    def _check_size(self, position: NodeId, node: ValueNode, found: _Found) -> None:
        """Raises TooLargeError for a value beyond the limit, if it counts."""
        if not self._is_counted(position, node):
            return
        value = found.value
        shape = list(value.shape) if isinstance(value, Meta) else [list(member.shape) for member in value[:3]]
        raise TooLargeError(
            f"{title(node)} would make a value of {found.num_bytes} bytes ({shape}); the limit is "
            f"{self.limits.max_value_bytes}",
            where=node.where,
        )


def _compacted(request: Request, names: Resolved, *, has_kept_rows: bool) -> frozenset[NodeId]:
    """Reads behind the head whose every use picks columns: the head runs on those only, so the picks are what costs.

    So are those of scores and patterns; `scheduling.program` checks how many columns are left of each.
    """
    nodes = request.graph.nodes
    picked, used = bytearray(len(nodes)), bytearray(len(nodes))  # by getitem, by anything else
    for node, parts in zip(nodes, names.operands, strict=True):
        marks = picked if isinstance(node, Op) and node.name == "getitem" else used
        for part in parts:
            marks[part] = 1
    found: set[NodeId] = set()
    for place, (node, entry) in enumerate(zip(nodes, names.sites, strict=True)):
        if not picked[place] or used[place]:
            continue
        is_read = (
            isinstance(node, Read)
            and entry is not None
            and ((has_kept_rows and entry[0].rows is Rows.KEPT) or entry[1].of_pairs)
        )
        if isinstance(node, Op) and node.name == "getitem" and isinstance(node.args[0], Ref):
            is_read = node.args[0].node in found
        if is_read:
            found.add(NodeId(place))
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
