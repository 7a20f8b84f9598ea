"""Which dimensions of its operands an op runs over: what it reduces, and what it sums in a product.

Read off the op's arguments, where torch says it in the signature. Knows no tokens and no pads (`engine.ragged` does).
"""

from __future__ import annotations

from typing import Any

from engine.meta import Meta
from polytrace.graph import NodeId, Op, Operand, Ref
from polytrace.ops import OPS

# Where `dim` stands among the positional arguments and what it is when it is not given; the others: (1, all).
_DIM_PLACES: dict[str, tuple[int, int | None]] = {
    "norm": (2, None),
    "linalg_norm": (2, None),
    "vector_norm": (2, None),
    "topk": (2, -1),
    "sort": (1, -1),
    "argsort": (1, -1),
    "cosine_similarity": (2, 1),
    "normalize": (2, 1),
}

Dims = list[tuple[NodeId, set[int]]]


def reduced_dims(op: Op, values: list[Any]) -> Dims:
    """Operands whose dimensions the op runs over by itself (sum, softmax, topk, norms), with these dimensions."""
    if op.name == "layer_norm":
        sizes = op.kwargs.get("normalized_shape", op.args[1] if len(op.args) > 1 else ())
        count = len(sizes) if isinstance(sizes, (tuple, list)) else 1
        return _last(op.args[0], values, set(range(-count, 0)))
    if not OPS[op.name].reduces and op.name not in _DIM_PLACES:
        return []
    place, default = _DIM_PLACES.get(op.name, (1, None))
    dim: Operand = op.kwargs.get("dim", op.args[place] if len(op.args) > place else default)
    if isinstance(dim, Ref):
        return []  # torch.max(a, b)
    dims: set[int] | None = None
    if isinstance(dim, int) and not isinstance(dim, bool):
        dims = {dim}
    elif isinstance(dim, (tuple, list)) and dim:
        dims = {part for part in dim if isinstance(part, int)}
    operands = op.args[:2] if op.name == "cosine_similarity" else op.args[:1]
    return [found for operand in operands for found in _last(operand, values, dims)]


def contracted(op: Op, values: list[Any]) -> Dims:
    """Operands of a product with the dimensions that it sums over."""
    if op.name == "einsum":
        return _einsum(op, values)
    if op.name in ("matmul", "mm", "bmm", "rmatmul", "dot"):
        left, right = (*op.args, op.kwargs.get("other"))[:2]
        if op.name == "rmatmul":
            left, right = right, left
        return [*_last(left, values, {-1}), *_last(right, values, {-2} if _rank(right, values) > 1 else {-1})]
    if op.name == "linear":
        weight = op.kwargs.get("weight", op.args[1] if len(op.args) > 1 else None)
        return [*_last(op.args[0], values, {-1}), *_last(weight, values, {-1})]
    return []


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
