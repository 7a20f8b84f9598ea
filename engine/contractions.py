"""Which dimensions of its operands an op runs over: what it reduces, and what it sums in a product.

The op table says how far an op reaches (`polytrace.ops.Reach`); which dimensions that are is read off the arguments,
where torch says it in the signature. What an op is not known to leave apart counts as run over. Knows no tokens and no
pads (`engine.ragged` does).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.meta import Meta
from polytrace.graph import NodeId, Op, Operand, Ref
from polytrace.graph import operands as operands_of
from polytrace.ops import OPS, Reach

Dims = list[tuple[NodeId, set[int]]]

# Ops whose operands all have the dimension: what is compared along it, or put there.
_MANY = frozenset(
    {
        *("cosine_similarity", "pairwise_distance", "vecdot", "cross", "linalg_cross"),
        *("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"),
    }
)
_DIAGONALS = {"diagonal": (0, 1), "linalg_diagonal": (-2, -1)}  # the dimensions where none are given
# The operand of which any place may decide, by its place and its name.
_SEARCHED = {"isin": (1, "test_elements"), "bucketize": (1, "boundaries"), "searchsorted": (0, "sorted_sequence")}
_BY_CLASS = frozenset({"cross_entropy", "nll_loss"})


def reduced_dims(op: Op, values: list[Any]) -> Dims:
    """Operands whose dimensions the op runs over by itself (sum, softmax, topk, norms), with these dimensions."""
    spec = OPS[op.name]
    everything = [found for node in operands_of(op) for found in _last(Ref(node), values, None)]
    match spec.reach:
        case Reach.MOVED if op.name in _DIAGONALS:
            return _last(op.args[0], values, _diagonal(op))
        case Reach.PLACE if op.name in _SEARCHED:
            place, name = _SEARCHED[op.name]
            return _last(op.args[place] if len(op.args) > place else op.kwargs.get(name), values, None)
        case Reach.PLACE | Reach.MOVED | Reach.CONTRACTED:
            return []
        case Reach.DIM:
            dim: Operand = op.kwargs.get("dim", op.args[spec.dim_place] if len(op.args) > spec.dim_place else None)
            if isinstance(dim, Ref):
                return []  # torch.max(a, b)
            return _along(op, values, spec.dim_default if dim is None else dim)
        case Reach.LAST:
            dims = set(range(-spec.num_last, 0))
            return [found for node in operands_of(op) for found in _last(Ref(node), values, dims)]
        case Reach.SHAPE:
            sizes = op.kwargs.get("normalized_shape", op.args[1] if len(op.args) > 1 else ())
            count = len(sizes) if isinstance(sizes, (tuple, list)) else 1
            return _last(op.args[0], values, set(range(-count, 0)))
        case Reach.LOSS if op.kwargs.get("reduction") == "none":
            if op.name not in _BY_CLASS:
                return []
            return _last(op.args[0], values, {1 if _rank(op.args[0], values) > 1 else 0})
    return everything


def _diagonal(op: Op) -> set[int] | None:
    """The two dimensions of which a diagonal is taken, None when they are not plain."""
    given = [op.kwargs.get(name, (*op.args, None, None, None)[place]) for name, place in (("dim1", 2), ("dim2", 3))]
    dims = [usual if dim is None else dim for dim, usual in zip(given, _DIAGONALS[op.name], strict=True)]
    return {dim for dim in dims if isinstance(dim, int)} if all(isinstance(dim, int) for dim in dims) else None


def _along(op: Op, values: list[Any], dim: Operand) -> Dims:
    dims: set[int] | None = None
    if isinstance(dim, int) and not isinstance(dim, bool):
        dims = {dim}
    elif isinstance(dim, (tuple, list)) and dim:
        dims = {part for part in dim if isinstance(part, int)}
    operands: Iterable[Operand] = op.args[:1]
    if dims is None or op.name in _MANY:
        operands = map(Ref, operands_of(op))
    return [found for operand in operands for found in _last(operand, values, dims)]


def contracted(op: Op, values: list[Any]) -> Dims:
    """Operands of a product with the dimensions that it sums over."""
    if OPS[op.name].reach is not Reach.CONTRACTED:
        return []
    if op.name == "einsum":
        return _einsum(op, values)
    if op.name == "tensordot":
        return _tensordot(op, values)
    if op.name == "linear":
        weight = op.kwargs.get("weight", op.args[1] if len(op.args) > 1 else None)
        return [*_last(op.args[0], values, {-1}), *_last(weight, values, {-1})]
    left, right = _factors(op)
    if op.name == "inner":
        return [*_last(left, values, {-1}), *_last(right, values, {-1})]
    return [*_last(left, values, {-1}), *_last(right, values, {-2} if _rank(right, values) > 1 else {-1})]


_SECOND = {"matmul": "other", "mm": "mat2", "bmm": "mat2", "mv": "vec", "dot": "tensor", "inner": "other"}
_ADDED = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2")}


def _factors(op: Op) -> tuple[Operand, Operand]:
    """The two matrices of a product, in order."""
    if op.name in _ADDED:  # behind what is added
        first, second = _ADDED[op.name]
        given = [*op.args[1:3]]
        left = given.pop(0) if given else op.kwargs.get(first)
        return left, given.pop(0) if given else op.kwargs.get(second)
    left, right = (*op.args, op.kwargs.get(_SECOND.get(op.name, "other")))[:2]
    return (right, left) if op.name == "rmatmul" else (left, right)


def _tensordot(op: Op, values: list[Any]) -> Dims:
    dims = op.kwargs.get("dims", op.args[2] if len(op.args) > 2 else 2)
    left, right = op.args[:2]
    if isinstance(dims, int):
        return [*_last(left, values, set(range(-dims, 0))), *_last(right, values, set(range(dims)))]
    if isinstance(dims, (tuple, list)) and len(dims) == 2:
        ours, theirs = ([part] if isinstance(part, int) else part for part in dims)
        if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
            return [*_last(left, values, _numbers(ours)), *_last(right, values, _numbers(theirs))]
    return [*_last(left, values, None), *_last(right, values, None)]


def _numbers(parts: Any) -> set[int]:
    return {part for part in parts if isinstance(part, int)}


def _einsum(op: Op, values: list[Any]) -> Dims:
    equation, *operands = op.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        return []
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "->" not in equation:
        letters = left.replace(",", "").replace(".", "")
        right = "".join(letter for letter in letters if letters.count(letter) == 1)
    found: Dims = []
    for term, operand in zip(terms, operands, strict=False):
        before, _, after = term.partition("...")
        dims = {place for place, letter in enumerate(before) if letter not in right}
        dims |= {place - len(after) for place, letter in enumerate(after) if letter not in right}
        found.extend(_last(operand, values, dims))
    return found


def _last(operand: Any, values: list[Any], dims: set[int] | None) -> Dims:
    """The operand with its dimensions counted from 0; None stands for all of them."""
    rank = _rank(operand, values)
    if not isinstance(operand, Ref):
        return []
    return [(operand.node, set(range(rank)) if dims is None else {dim % rank for dim in dims if rank})]


def _rank(operand: Any, values: list[Any]) -> int:
    value = values[operand.node] if isinstance(operand, Ref) else None
    return len(value.shape) if isinstance(value, Meta) else 0
