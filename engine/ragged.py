"""Refuses reductions that would count pad rows: prompts of different lengths are one left-padded view.

Owns which dimensions of each value run over tokens of such a view, and whether a mask has been at work on it. A
dimension runs over tokens when it grows as the view grows by one token: every op is looked at a second time on a longer
view. Where an op does not fit the longer view (sizes written as numbers), its dimensions follow from its operands'.

Invariant: requests whose prompts have one length cost nothing here and are never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch

from engine.indexing import places
from engine.meta import MISFITS, Meta, contiguous, freeze, result_of
from polytrace.errors import GraphError
from polytrace.graph import Call, NodeId, Op, Ref, Request
from polytrace.graph import operands as operands_of
from polytrace.ops import OPS, Reach, Results
from polytrace.ops.contractions import contracted, reduced_dims

_HINT = (
    "pad rows would be counted: multiply by tracer.mask[..., None] (and divide by tracer.mask.sum(1, keepdim=True)) "
    "or use value.at(pos); over the keys of scores and patterns the mask is tracer.mask[:, None, None, :], and behind "
    "step 0 each prompt has to be in an invoke of its own"
)

# Ops that put new parts into a value of the old shape, and ops whose result has the old elements in the old order.
_PUT = frozenset(
    {
        *("setitem", "set_view", "select_scatter", "slice_scatter", "diagonal_scatter"),
        *("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"),
    }
)
# Ops that leave a dimension in its order where they leave its size.
_ORDERED = frozenset({"cat", "stack", "hstack", "vstack", "dstack", "column_stack", "repeat", "tile", "one_hot"})
_RESHAPED = frozenset({"view", "view_as", "reshape", "reshape_as", "unflatten", "flatten", "ravel"})

Value = Meta | tuple[Meta, ...] | None


class Kind(Enum):
    """What stands in the pad rows of a value."""

    RAW = "raw"  # whatever the model and the program put there
    MASKED = "masked"  # a mask has been combined with it
    MASK = "mask"  # it is made of masks only


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The tokens that a dimension runs over: columns of a view, when they are known."""

    known: range | None
    first_full: int  # columns from this one on have a token in every prompt

    @property
    def has_pads(self) -> bool:
        """Whether a column may be a pad in some prompt."""
        return self.known is None or (len(self.known) > 0 and min(self.known) < self.first_full)

    def cut(self, part: slice) -> Columns:
        """The columns that a slice leaves."""
        bounds = (part.start, part.stop, part.step)
        is_plain = self.known is not None and all(bound is None or isinstance(bound, int) for bound in bounds)
        return Columns(
            known=self.known[part] if is_plain and self.known is not None else None, first_full=self.first_full
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token dimensions of one value."""

    kind: Kind
    dims: dict[int, Columns]  # only those with pads
    longer: Meta  # the value on a view that is one token longer


Members: TypeAlias = tuple[Tokens | None, ...]  # of a value, or of each of several


class TokenDimensions:
    """Token dimensions of one request's values, node by node."""

    def __init__(self, request: Request, needs: Sequence[tuple[NodeId, ...]]) -> None:
        self._invokes = request.invokes
        self._needs = needs  # per node, the nodes whose values it needs
        self._found: dict[NodeId, Members] = {}  # per node and member; absent: no token dimension

    def members(self, position: NodeId) -> Members | None:
        """What was found of a node, None when it has no token dimension."""
        return self._found.get(position)

    def note(self, position: NodeId, members: Members | None) -> None:
        """Takes over what was found of a node of the same structure."""
        if members is not None:
            self._found[position] = members

    def read(self, position: NodeId, invoke: int, view: Meta, dims: tuple[int, ...] = (1,)) -> None:
        """A site's view of an invoke; `dims` run over tokens."""
        self._view(position, invoke, view, Kind.RAW, dims)

    def earlier(self, position: NodeId, invoke: int, view: Meta, dim: int) -> None:
        """A site's view behind step 0 that has, in one dimension, what came before."""
        prompts = self._invokes[invoke]
        if prompts.pads:
            columns = Columns(known=range(prompts.before + prompts.longest), first_full=prompts.pads)
            self._note(position, (_tokens_of(Kind.RAW, {dim: columns}, view),))

    def mask(self, position: NodeId, invoke: int, view: Meta) -> None:
        """A mask of an invoke."""
        self._view(position, invoke, view, Kind.MASK, (1,))

    def op(self, position: NodeId, op: Op, args: tuple[Any, ...], values: list[Any], value: Value) -> None:
        """Notes the op's token dimensions. Raises GraphError when it would count pad rows."""
        if op.name == "left_pad" and isinstance(value, Meta):
            self._note(position, (self._group(op, values, value),))
            return
        if not self._found or self._found.keys().isdisjoint(self._needs[position]):
            return
        self._refuse(op, args, values)
        if op.name == "item":
            assert isinstance(op.args[0], Ref) and isinstance(op.args[1], int)
            self._note(position, (self._found[op.args[0].node][op.args[1]],))
        elif isinstance(value, tuple) and not isinstance(value, Meta):
            self._note(position, self._members(op, args, values, value))
        elif isinstance(value, Meta):
            self._note(position, (self._one(op, args, values, value),))

    def _group(self, op: Op, values: list[Any], value: Meta) -> Tokens | None:
        """Views of several invokes below each other: pads are theirs, and those in front of shorter ones."""
        parts, dims = op.args
        assert isinstance(parts, list) and isinstance(dims, tuple)
        found: dict[int, Columns] = {}
        for dim in dims:
            assert isinstance(dim, int)
            first_full = 0
            for part in parts:
                assert isinstance(part, Ref)
                tokens, longest = self._tokens(part.node), value.shape[dim]
                own = tokens.dims.get(dim) if tokens is not None else None
                pads = longest - values[part.node].shape[dim]
                first_full = max(first_full, pads + (0 if own is None else own.first_full))
            found[dim] = Columns(known=range(longest), first_full=first_full)
        kind = Kind.MASK if value.dtype is torch.bool else Kind.RAW
        return _tokens_of(kind, found, value)

    def call(self, position: NodeId, call: Call, values: list[Any], value: Meta) -> None:
        """A module works row by row: leading dimensions stay what they are."""
        for part in operands_of(call):
            tokens = self._tokens(part)
            if tokens is not None and len(value.shape) == len(values[part].shape):
                dims = {dim: columns for dim, columns in tokens.dims.items() if dim != len(value.shape) - 1}
                self._note(position, (_tokens_of(tokens.kind, dims, value),))
                return

    def _view(self, position: NodeId, invoke: int, view: Meta, kind: Kind, dims: tuple[int, ...]) -> None:
        prompts = self._invokes[invoke]
        if prompts.is_ragged:
            shortest = min(len(sequence) for sequence in prompts.sequences)
            columns = Columns(known=range(prompts.longest), first_full=prompts.longest - shortest)
            self._note(position, (_tokens_of(kind, dict.fromkeys(dims, columns), view),))

    def _note(self, position: NodeId, members: Members) -> None:
        if any(member is not None for member in members):
            self._found[position] = members

    def _tokens(self, node: NodeId) -> Tokens | None:
        """Token dimensions of a single value."""
        members = self._found.get(node, (None,))
        return members[0] if len(members) == 1 else None

    # --- refusals

    def _refuse(self, op: Op, args: tuple[Any, ...], values: list[Any]) -> None:
        for operand, dims in reduced_dims(op, _rank_in(values)):
            tokens = self._tokens(operand)
            if tokens is not None and tokens.kind is Kind.RAW and not dims.isdisjoint(tokens.dims):
                raise GraphError(f"{op.name} runs over the tokens of prompts of different lengths; {_HINT}")
        pairs = contracted(op, _rank_in(values))
        kinds = {tokens.kind for operand, _ in pairs if (tokens := self._tokens(operand)) is not None}
        if kinds & {Kind.MASK, Kind.MASKED}:
            return  # what is 0 in the pad rows takes the others' pad rows out of the sum
        for operand, dims in pairs:
            tokens = self._tokens(operand)
            if tokens is not None and not dims.isdisjoint(tokens.dims):
                raise GraphError(f"{op.name} sums over the tokens of prompts of different lengths; {_HINT}")

    # --- token dimensions of results

    def _one(self, op: Op, args: tuple[Any, ...], values: list[Any], value: Meta) -> Tokens | None:
        kind = self._kind(op)
        if op.name in ("getitem", "narrow", "narrow_copy", "select"):
            base = self._base(op)
            if base is None:
                return None  # a token dimension only in the index: what it picks is the program's choice
            dims = _picked(op, args, base.dims, len(base.longer.shape))
            return None if dims is None else _tokens_of(kind, dims, value)
        if op.name in _PUT and (base := self._base(op)) is not None:
            return Tokens(kind=kind, dims=base.dims, longer=base.longer)
        if op.name in _PUT - {"setitem", "set_view"}:
            return _tokens_of(kind, self._anywhere(op, value), value)  # rows put into what has none
        try:
            longer = result_of(op.name, *self._longer(op, args, values))
        except MISFITS:  # a size written as a number does not grow
            return _tokens_of(kind, self._by_place(op, values, value), value)
        if not isinstance(longer, Meta) or len(longer.shape) != len(value.shape):
            return None
        grown = [dim for dim, (size, more) in enumerate(zip(value.shape, longer.shape, strict=True)) if size != more]
        if not grown:
            return None
        return Tokens(kind=kind, dims=self._grown(op, grown, value), longer=longer)

    def _members(self, op: Op, args: tuple[Any, ...], values: list[Any], value: tuple[Meta, ...]) -> Members:
        base, kind = self._base(op), self._kind(op)
        if OPS[op.name].results is not Results.LIST:
            return self._named(op, args, values, value)
        if base is None:
            return ()
        place = 1 if op.name == "unbind" else 2
        along = op.kwargs.get("dim", args[place] if len(args) > place else 0)
        dim = along % len(base.longer.shape) if isinstance(along, int) else 0
        if op.name == "unbind":
            rest = {old - (old > dim): columns for old, columns in base.dims.items() if old != dim}
            return tuple([_tokens_of(kind, rest, member) for member in value])
        members, start = [], 0
        for member in value:
            stop = start + member.shape[dim]
            cut = {
                old: columns.cut(slice(start, stop)) if old == dim else columns for old, columns in base.dims.items()
            }
            members.append(_tokens_of(kind, cut, member))
            start = stop
        return tuple(members)

    def _named(self, op: Op, args: tuple[Any, ...], values: list[Any], value: tuple[Meta, ...]) -> Members:
        """Of topk, sort, max, svd: a dimension that is run over and stays has no raw tokens."""
        kind = self._kind(op)
        reduced = {dim for _, dims in reduced_dims(op, _rank_in(values)) for dim in dims}
        rank = max(len(values[part].shape) for part in operands_of(op) if self._tokens(part) is not None)
        try:
            longer = result_of(op.name, *self._longer(op, args, values))
        except MISFITS:  # a size written as a number does not grow
            return tuple([_tokens_of(kind, self._by_place(op, values, member), member) for member in value])
        assert not isinstance(longer, Meta)
        found = []
        for member, more in zip(value, longer, strict=True):
            gone = reduced if len(member.shape) == rank else set()
            sizes = enumerate(zip(member.shape, more.shape, strict=True))
            grown = [dim for dim, (size, long) in sizes if size != long and dim not in gone]
            found.append(_tokens_of(kind, self._grown(op, grown, member), member))
        return tuple(found)

    def _grown(self, op: Op, grown: list[int], value: Meta) -> dict[int, Columns]:
        """The columns of token dimensions, where the op leaves them in their places."""
        known = self._columns(op)
        if OPS[op.name].reach in (Reach.MOVED, Reach.WHOLE) and op.name not in _ORDERED:
            return dict.fromkeys(grown, _unknown(known))
        return {dim: _matching(known, value.shape[dim]) for dim in grown}

    def _anywhere(self, op: Op, value: Meta) -> dict[int, Columns]:
        """Every dimension, where nothing says which."""
        return dict.fromkeys(range(len(value.shape)), _unknown(self._columns(op)))

    def _kind(self, op: Op) -> Kind:
        kinds = {tokens.kind for part in operands_of(op) if (tokens := self._tokens(part)) is not None}
        if kinds <= {Kind.MASK}:
            return Kind.MASK
        if Kind.MASK in kinds or kinds == {Kind.MASKED}:
            return Kind.MASKED
        is_product = op.name in ("mul", "div") or OPS[op.name].reach is Reach.CONTRACTED
        return Kind.MASKED if Kind.MASKED in kinds and is_product else Kind.RAW

    def _base(self, op: Op) -> Tokens | None:
        base = op.args[0]
        return self._tokens(base.node) if isinstance(base, Ref) else None

    def _longer(self, op: Op, args: tuple[Any, ...], values: list[Any]) -> tuple[Any, Any]:
        longer = _Overlay(values, self)
        frozen = tuple([freeze(argument, longer) for argument in args])
        return frozen, tuple([(key, freeze(part, longer)) for key, part in op.kwargs.items()])

    def _columns(self, op: Op) -> list[Columns]:
        found = [self._tokens(part) for part in operands_of(op)]
        return [columns for tokens in found if tokens is not None for columns in tokens.dims.values()]

    def _by_place(self, op: Op, values: list[Any], value: Meta) -> dict[int, Columns]:
        """Token dimensions by where they stand: from the right for broadcasting, by strides for a new shape.

        Of an op that does neither, any dimension may be one.
        """
        dims: dict[int, Columns] = {}
        if OPS[op.name].reach is not Reach.PLACE and op.name != "cat":
            return self._anywhere(op, value)
        for part in operands_of(op):
            tokens = self._tokens(part)
            if tokens is None:
                continue
            shape = values[part].shape
            for dim, columns in tokens.dims.items():
                if op.name in _RESHAPED:
                    dims |= dict.fromkeys(_covering(shape, dim, value.shape), columns)
                else:
                    place = len(value.shape) - len(shape) + dim
                    if place >= 0 and value.shape[place] == shape[dim]:
                        dims[place] = columns
        return dims


class _Overlay:
    """Values of a request on a view that is one token longer."""

    def __init__(self, values: list[Any], tokens: TokenDimensions) -> None:
        self._values = values
        self._tokens = tokens

    def __getitem__(self, node: NodeId) -> Any:
        tokens = self._tokens._tokens(node)
        return tokens.longer if tokens is not None else self._values[node]


def _rank_in(values: list[Any]) -> Callable[[NodeId], int]:
    """How many dimensions each value has; several together have none."""
    return lambda node: len(value.shape) if isinstance(value := values[node], Meta) else 0


def _tokens_of(kind: Kind, dims: dict[int, Columns], value: Meta) -> Tokens | None:
    """Token dimensions of a value whose longer form is one more in each of them; None when none has pads."""
    padded = {dim: columns for dim, columns in dims.items() if columns.has_pads}
    if not padded:
        return None
    shape = tuple([size + (dim in padded) for dim, size in enumerate(value.shape)])
    return Tokens(kind=kind, dims=padded, longer=contiguous(shape, value.dtype))


def _matching(known: list[Columns], size: int) -> Columns:
    """The columns of a grown dimension: an operand's when its size says so."""
    fitting = {columns.known: columns for columns in known if columns.known is not None and len(columns.known) == size}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    return _unknown(known)


def _unknown(known: list[Columns]) -> Columns:
    return Columns(known=None, first_full=max(columns.first_full for columns in known))


def _picked(op: Op, args: tuple[Any, ...], dims: dict[int, Columns], rank: int) -> dict[int, Columns] | None:
    """Token dimensions that an index leaves, with their columns."""
    if op.name == "getitem":
        index = args[1]
    else:
        names = ("dim", "index") if op.name == "select" else ("dim", "start", "length")
        bound: dict[str, Any] = {**dict(zip(names, args[1:], strict=False)), **op.kwargs}
        if not all(isinstance(bound.get(name), int) for name in names):
            return None
        dim, start = bound["dim"] % rank, bound.get("start", 0)
        part = bound["index"] if op.name == "select" else slice(start, start + bound["length"])
        index = (*([slice(None)] * dim), part)
    found = {}
    for new, place in enumerate(places(rank, index)):
        if place is not None and place[0] in dims:
            found[new] = dims[place[0]].cut(place[1])
    return found


def _covering(old: tuple[int, ...], dim: int, new: tuple[int, ...]) -> list[int]:
    """Dimensions of a new shape that run over a dimension of the old one, both row-major."""
    low = _span(old, dim + 1)
    high = low * old[dim]
    found = []
    for place, size in enumerate(new):
        step = _span(new, place + 1)
        if size > 1 and step < high and step * size > low:
            found.append(place)
    return found


def _span(shape: tuple[int, ...], first: int) -> int:
    total = 1
    for size in shape[first:]:
        total *= size
    return total
