"""Which dimensions of its operands an op runs over: what it reduces, and what it sums in a product.

The op table says how far an op reaches (`polytrace.ops.Reach`); which dimensions that are is read off the arguments,
where torch says it in the signature. What an op is not known to leave apart counts as run over. Knows no shapes but the
number of dimensions, no tokens and pads (`engine.ragged` does) and no prompts (`polytrace.maps.rowwise` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from polytrace.graph import NodeId, Op, Operand, Ref
from polytrace.graph import operands as operands_of
from polytrace.ops import OPS, Reach

Dims = list[tuple[NodeId, set[int]]]
Rank = Callable[[NodeId], int]  # how many dimensions a value has

# Ops whose operands all have the dimension: what is compared along it, or put there.
COMPARED = frozenset({"cosine_similarity", "pairwise_distance", "vecdot", "cross", "linalg_cross"})
_PUT = frozenset({"scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"})
_DIAGONALS = {"diagonal": (0, 1), "linalg_diagonal": (-2, -1)}  # the dimensions where none are given
# The operand of which any place may decide, by its place and its name.
_SEARCHED = {"isin": (1, "test_elements"), "bucketize": (1, "boundaries"), "searchsorted": (0, "sorted_sequence")}
_BY_CLASS = frozenset({"cross_entropy", "nll_loss"})


def reduced_dims(op: Op, rank: Rank) -> Dims:
    """Operands whose dimensions the op runs over by itself (sum, softmax, topk, norms), with these dimensions."""
    spec = OPS[op.name]
    everything = [found for node in operands_of(op) for found in _last(Ref(node), rank, None)]
    match spec.reach:
        case Reach.MOVED if op.name in _DIAGONALS:
            return _last(op.args[0], rank, _diagonal(op))
        case Reach.PLACE if op.name in _SEARCHED:
            place, name = _SEARCHED[op.name]
            return _last(op.args[place] if len(op.args) > place else op.kwargs.get(name), rank, None)
        case Reach.PLACE | Reach.MOVED | Reach.CONTRACTED:
            return []
        case Reach.DIM:
            return [] if is_between(op) else _along(op, rank)
        case Reach.LAST:
            dims = set(range(-spec.num_last, 0))
            return [found for node in operands_of(op) for found in _last(Ref(node), rank, dims)]
        case Reach.SHAPE:
            sizes = op.kwargs.get("normalized_shape", op.args[1] if len(op.args) > 1 else ())
            count = len(sizes) if isinstance(sizes, (tuple, list)) else 1
            return _last(op.args[0], rank, set(range(-count, 0)))
        case Reach.LOSS if op.kwargs.get("reduction") == "none":
            if op.name not in _BY_CLASS:
                return []
            return _last(op.args[0], rank, {1 if _rank(op.args[0], rank) > 1 else 0})
    return everything


def _diagonal(op: Op) -> set[int] | None:
    """The two dimensions of which a diagonal is taken, None when they are not plain."""
    given = [op.kwargs.get(name, (*op.args, None, None, None)[place]) for name, place in (("dim1", 2), ("dim2", 3))]
    dims = [usual if dim is None else dim for dim, usual in zip(given, _DIAGONALS[op.name], strict=True)]
    return {dim for dim in dims if isinstance(dim, int)} if all(isinstance(dim, int) for dim in dims) else None


def is_between(op: Op) -> bool:
    """Whether it is `torch.max(a, b)`, element by element."""
    return op.name in ("max", "min") and len(operands_of(op)) > 1


def dims_along(op: Op, rank: int) -> set[int]:
    """The dimensions, of so many, that an op of Reach.DIM runs over."""
    given = _given_dims(op)
    return set(range(rank)) if given is None else {dim % rank for dim in given if rank}


def _given_dims(op: Op) -> set[int] | None:
    """As they are given; None: all."""
    spec = OPS[op.name]
    given: Any = op.kwargs.get("dim", op.args[spec.dim_place] if len(op.args) > spec.dim_place else None)
    given = spec.dim_default if given is None else given
    dims = list(given) if isinstance(given, (tuple, list)) else [given]
    return set(dims) if dims and all(type(dim) is int for dim in dims) else None


def _along(op: Op, rank: Rank) -> Dims:
    nodes, dims = operands_of(op), _given_dims(op)
    if op.name in COMPARED:  # counted in what both are stretched to
        widest = max(map(rank, nodes), default=0)
        found = [(node, {dim - widest + rank(node) for dim in dims_along(op, widest)}) for node in nodes]
        return [(node, {dim for dim in own if dim >= 0}) for node, own in found]
    operands: Iterable[Operand] = map(Ref, nodes) if dims is None or op.name in _PUT else op.args[:1]
    return [found for operand in operands for found in _last(operand, rank, dims)]


def contracted(op: Op, rank: Rank) -> Dims:
    """Operands of a product with the dimensions that it sums over."""
    if OPS[op.name].reach is not Reach.CONTRACTED:
        return []
    if op.name == "einsum":
        return _einsum(op, rank)
    if op.name == "tensordot":
        return _tensordot(op, rank)
    if op.name == "linear":
        weight = op.kwargs.get("weight", op.args[1] if len(op.args) > 1 else None)
        return [*_last(op.args[0], rank, {-1}), *_last(weight, rank, {-1})]
    left, right = factors(op)
    if op.name == "inner":
        return [*_last(left, rank, {-1}), *_last(right, rank, {-1})]
    return [*_last(left, rank, {-1}), *_last(right, rank, {-2} if _rank(right, rank) > 1 else {-1})]


_SECOND = {"matmul": "other", "mm": "mat2", "bmm": "mat2", "mv": "vec", "dot": "tensor", "inner": "other"}
_ADDED = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2")}


def factors(op: Op) -> tuple[Operand, Operand]:
    """The two matrices of a product, in order."""
    if op.name in _ADDED:  # behind what is added
        first, second = _ADDED[op.name]
        given = [*op.args[1:3]]
        left = given.pop(0) if given else op.kwargs.get(first)
        return left, given.pop(0) if given else op.kwargs.get(second)
    left, right = (*op.args, op.kwargs.get(_SECOND.get(op.name, "other")))[:2]
    return (right, left) if op.name == "rmatmul" else (left, right)


def _tensordot(op: Op, rank: Rank) -> Dims:
    dims = op.kwargs.get("dims", op.args[2] if len(op.args) > 2 else 2)
    left, right = op.args[:2]
    if isinstance(dims, int):
        return [*_last(left, rank, set(range(-dims, 0))), *_last(right, rank, set(range(dims)))]
    if isinstance(dims, (tuple, list)) and len(dims) == 2:
        ours, theirs = ([part] if isinstance(part, int) else part for part in dims)
        if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
            return [*_last(left, rank, _numbers(ours)), *_last(right, rank, _numbers(theirs))]
    return [*_last(left, rank, None), *_last(right, rank, None)]


def _numbers(parts: Any) -> set[int]:
    return {part for part in parts if isinstance(part, int)}


def einsum_terms(op: Op) -> tuple[list[str], str, list[Operand]]:
    """What an equation calls the dimensions of each operand and of the result, and the operands."""
    equation, *operands = op.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    assert isinstance(equation, str), "einsum begins with its equation"
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(one for one in letters if letters.count(one) == 1))
    return left.split(","), right, operands


def _einsum(op: Op, rank: Rank) -> Dims:
    terms, right, operands = einsum_terms(op)
    found: Dims = []
    for term, operand in zip(terms, operands, strict=False):
        before, dots, after = term.partition("...")
        dims = {place for place, letter in enumerate(before) if letter not in right}
        dims |= {place - len(after) for place, letter in enumerate(after) if letter not in right}
        if dots and dots not in right:
            dims |= set(range(len(before), _rank(operand, rank) - len(after)))
        found.extend(_last(operand, rank, dims))
    return found


def _last(operand: Operand, rank: Rank, dims: set[int] | None) -> Dims:
    """The operand with its dimensions counted from 0; None stands for all of them."""
    if not isinstance(operand, Ref):
        return []
    own = rank(operand.node)
    return [(operand.node, set(range(own)) if dims is None else {dim % own for dim in dims if own})]


def _rank(operand: Operand, rank: Rank) -> int:
    return rank(operand.node) if isinstance(operand, Ref) else 0
