"""Where the prompts' dimension of an op's operands is in its result, by how far the op reaches.

A rule is asked of ops that do not run over that dimension; an op that moves dimensions in its own way has its own rule
(`row_rules`).
"""

from __future__ import annotations

from polytrace.graph import Op, operands
from polytrace.maps.row_values import Dim, MixesError, Rows, Rule, Shape, argument, only
from polytrace.ops import Reach
from polytrace.ops.contractions import COMPARED, dims_along, factors, is_between


def aligned(walk: Rows, op: Op, result: Shape) -> Dim:
    """Operands that are stretched to one shape: counted from the right."""
    return only(len(result) - tensor.rank + tensor.dim for tensor in walk.operands(op) if tensor.dim is not None)


def _along(walk: Rows, op: Op, result: Shape) -> Dim:
    """What runs over dimensions, which stay or go."""
    if is_between(op):
        return aligned(walk, op, result)
    tensors, base = walk.operands(op), walk.tensor(op.args[0])
    rank = max(tensor.rank for tensor in tensors) if op.name in COMPARED else base.rank
    if op.name not in COMPARED and any(tensor.rank and tensor.place != base.place for tensor in tensors):
        raise MixesError
    dim, dims = only(rank - one.rank + one.dim for one in tensors if one.dim is not None), dims_along(op, rank)
    if dim in dims or len(result) not in (rank, rank - len(dims)):
        raise MixesError
    return dim if len(result) == rank else dim - sum(one < dim for one in dims)


def of_first(walk: Rows, op: Op, result: Shape) -> Dim:
    """What works on the last dimensions of its first operand, with weights that are the same for all."""
    if any(walk.dims[part] is not None for part in operands(op)[1:]):
        raise MixesError
    return walk.tensor(op.args[0]).rows


def batched(walk: Rows, op: Op, result: Shape) -> Dim:
    """What works on the last dimensions of each operand; those in front are a batch, and all operands have it."""
    tensors = walk.operands(op)
    if len({tensor.rank for tensor in tensors}) != 1:
        raise MixesError
    return only(tensor.dim for tensor in tensors)


def _loss(walk: Rows, op: Op, result: Shape) -> Dim:
    """Element by element, or over classes: dimension 1 of predictions, which targets have not or have too."""
    if op.name not in ("cross_entropy", "nll_loss"):
        return aligned(walk, op, result)
    base, target = walk.tensor(op.args[0]), walk.tensor(argument(op, 1, "target"))
    dim = base.rows - (base.rows > 1)
    if base.rank < 2 or target.rows != (base.rows if target.rank == base.rank else dim):
        raise MixesError
    if any(walk.dims[part] is not None for part in operands(op)[2:]):
        raise MixesError
    return dim


def _product(walk: Rows, op: Op, result: Shape) -> Dim:
    """The dimensions in front are a batch, counted from the right; each matrix has one of its own in the result."""
    left, right = map(walk.tensor, factors(op))
    found: list[Dim] = []
    for tensor, own in ((left, -2), (right, -1)):
        if tensor.dim is None:
            continue
        from_right = tensor.dim - tensor.rank
        if from_right == own:
            found.append(len(result) - 1 if own == -1 or right.rank == 1 else len(result) - 2)
        else:  # a batch dimension; a factor that is a vector takes its own dimension away
            found.append(len(result) + from_right + (left.rank == 1) + (right.rank == 1))
    if op.name.startswith(("addm", "badd")):
        added = walk.tensor(op.args[0])
        found.append(None if added.dim is None else len(result) - added.rank + added.dim)
    return only(found)


BY_REACH: dict[Reach, Rule] = {
    Reach.PLACE: aligned,
    Reach.DIM: _along,
    Reach.LAST: batched,
    Reach.SHAPE: of_first,
    Reach.LOSS: _loss,
    Reach.CONTRACTED: _product,
}
