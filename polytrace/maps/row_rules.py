"""Per op, where the prompts' dimension of its operands is in its result; an op that is not here may mix prompts."""

from __future__ import annotations

from math import prod

from polytrace.graph import Op, Ref, operands
from polytrace.maps.row_indices import STEPS, flat, getitem, set_view, setitem, stepped
from polytrace.maps.row_values import Dim, MixesError, Rows, Rule, argument, only


def _elementwise(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """Operands that broadcast: aligned from the right."""
    assert result is not None
    tensors = [walk.tensor(Ref(part)) for part in operands(op)]
    return only(len(result) - tensor.rank + tensor.dim for tensor in tensors if tensor.dim is not None)


def _along(place: int, default: int | None = None, *, operands: int = 1) -> Rule:
    """Ops that run over `dim`, argument number `place`; without it over `default`, or everything."""

    def rule(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
        tensors = [walk.tensor(arg) for arg in op.args[:operands]]
        rank = max(tensor.rank for tensor in tensors)
        dim = only(rank - tensor.rank + tensor.dim for tensor in tensors if tensor.dim is not None)
        over = argument(op, place, "dim", default)
        dims = {one % rank for one in ((over,) if type(over) is int else over or range(rank))}
        if dim in dims or any(isinstance(part, Ref) for part in (*op.args[operands:], *op.kwargs.values())):
            raise MixesError
        is_kept = bool(op.kwargs.get("keepdim")) or op.name in _KEEPS_RANK or any(arg is True for arg in op.args)
        if result is not None:
            is_kept = len(result) == rank
        return dim if is_kept else dim - sum(one < dim for one in dims)

    return rule


_KEEPS_RANK = frozenset({"topk", "sort"})


def _extreme(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """`max(other)` is element by element, `max(dim)` runs over it."""
    if isinstance(argument(op, 1, "other"), Ref):
        return _elementwise(walk, op, result)
    return _along(1)(walk, op, result)


def _layer_norm(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    base, sizes = walk.tensor(op.args[0]), argument(op, 1, "normalized_shape")
    if base.rows >= base.rank - len(sizes) or any(walk.tensor(Ref(part)).dim is not None for part in operands(op)[1:]):
        raise MixesError
    return base.rows


def _matmul(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    assert result is not None
    left, right = (walk.tensor(arg) for arg in (*op.args, op.kwargs.get("other"))[:2])
    if len(operands(op)) > sum(isinstance(arg, Ref) for arg in (*op.args, op.kwargs.get("other"))):
        raise MixesError  # a factor under another name
    if op.name == "rmatmul":
        left, right = right, left
    found: list[Dim] = []
    for tensor, summed, own in ((left, -1, -2), (right, -2, -1)):
        if tensor.dim is None:
            continue
        from_right = tensor.dim - tensor.rank
        if tensor.rank == 1 or from_right == summed:
            raise MixesError
        if from_right == own:
            found.append(len(result) - 1 if own == -1 or right.rank == 1 else len(result) - 2)
        else:  # a batch dimension; a factor that is a vector takes its own dimension away
            found.append(len(result) + from_right + (left.rank == 1) + (right.rank == 1))
    return only(found)


def _linear(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    base = walk.tensor(op.args[0])
    others = (*op.args[1:], *op.kwargs.values())
    if base.rows == base.rank - 1 or any(walk.tensor(part).dim is not None for part in others):
        raise MixesError
    return base.rows


def _outer(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    left, right = (walk.tensor(arg) for arg in op.args)
    return only((left.dim, None if right.dim is None else 1))


def _einsum(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    equation, *parts = op.args
    if len(parts) == 1 and isinstance(parts[0], (tuple, list)):
        parts = list(parts[0])
    if not isinstance(equation, str) or "->" not in equation:
        raise MixesError
    left, _, right = equation.replace(" ", "").partition("->")
    tensors = [walk.tensor(part) for part in parts]
    widest = max(
        tensor.rank - len(term.replace("...", "")) for term, tensor in zip(left.split(","), tensors, strict=True)
    )
    letters = [_letters(term, tensor.rank) for term, tensor in zip(left.split(","), tensors, strict=True)]
    letter = {own[tensor.dim] for own, tensor in zip(letters, tensors, strict=True) if tensor.dim is not None}
    if len(letter) != 1:
        raise MixesError
    (wanted,) = letter
    own_only = [own for own, tensor in zip(letters, tensors, strict=True) if tensor.dim is None]
    if any(wanted in own for own in own_only) or any(own.count(wanted) > 1 for own in letters):
        raise MixesError
    return _letters(right, len(right.replace("...", "")) + (widest if "..." in right else 0)).index(wanted)


def _letters(term: str, rank: int) -> list[str]:
    """A name for each dimension; those of an ellipsis are counted from its right end."""
    before, dots, after = term.partition("...")
    free = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{place}" for place in range(free, 0, -1)), *after]


def _squeezed(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """Without `dim` the prompts' dimension would go where there is one prompt, and stay where there are two."""
    base, at = walk.tensor(op.args[0]), argument(op, 1, "dim")
    if result is None or type(at) is not int or at % base.rank == base.rows:
        raise MixesError
    return base.rows - (len(result) < base.rank and at % base.rank < base.rows)


def _reshaped(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """Row-major: the prompts' dimension is where as many elements are before it as there were."""
    assert result is not None
    base = walk.tensor(op.args[0])
    before = prod(base.shape[: base.rows])
    fitting = [place for place, size in enumerate(result) if size == 1 and prod(result[:place]) == before]
    return only(fitting[:1])


def _repeated(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """`repeat`, `expand`: new dimensions come first. Whether prompts were repeated, their size says."""
    assert result is not None
    base = walk.tensor(op.args[0])
    return len(result) - base.rank + base.rows


def _of_rows(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """gather, scatter: every tensor has each prompt's own."""
    base = walk.tensor(op.args[0])
    at = op.kwargs.get("dim", next((arg for arg in op.args[1:] if type(arg) is int), None))
    if type(at) is not int or at % base.rank == base.rows:
        raise MixesError
    for part in operands(op):
        tensor = walk.tensor(Ref(part))
        if tensor.dim != base.rows or tensor.rank != base.rank:
            raise MixesError
    return base.rows


def _other_dim(place: int) -> Rule:
    """flip, roll, index_select, ...: along dimensions that are said, by numbers that are the same for all prompts."""

    def rule(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
        base = walk.tensor(op.args[0])
        name = "dims" if op.name in ("flip", "roll") else "dim"
        over = flat(op.kwargs.get(name, op.args[place:] if op.name == "flip" else argument(op, place, name)))
        if not all(type(one) is int for one in over) or base.rows in {one % base.rank for one in over}:
            raise MixesError
        if any(walk.dims[part] is not None for part in operands(op)[1:]):
            raise MixesError
        return base.rows

    return rule


def _last_two(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    base = walk.tensor(op.args[0])
    if base.rows >= base.rank - 2:
        raise MixesError
    return base.rows


def _joined(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    parts, at = op.args[0], argument(op, 1, "dim", 0)
    assert isinstance(parts, (tuple, list)) and result is not None and type(at) is int
    tensors = [walk.tensor(part) for part in parts]
    dim = only(tensor.rows for tensor in tensors)
    if op.name == "stack":
        return dim + (at % len(result) <= dim)
    if at % len(result) == dim:
        raise MixesError
    return dim


def _item(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    return walk.tensor(op.args[0]).rows


def _same(walk: Rows, op: Op, result: tuple[int, ...] | None) -> Dim:
    """The first operand's dimensions, with others behind them."""
    if any(walk.dims[part] is not None for part in operands(op)[1:]):
        raise MixesError
    return walk.tensor(op.args[0]).rows


def _words(text: str, rule: Rule) -> dict[str, Rule]:
    """One rule for many ops."""
    return dict.fromkeys(text.split(), rule)


_ELEMENTWISE = """
    add sub rsub mul div rdiv floor_divide rfloor_divide remainder rremainder fmod pow rpow float_power neg
    positive abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sign sgn sin cos tan asin acos
    atan sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc erfinv clamp clamp_min clamp_max round floor ceil
    trunc frac maximum minimum fmax fmin hypot atan2 copysign logaddexp logaddexp2 relu relu6 gelu silu mish elu
    selu celu leaky_relu softplus softsign logsigmoid hardtanh hardswish hardsigmoid tanhshrink nan_to_num lerp
    addcmul addcdiv eq ne lt le gt ge isclose isfinite isinf isnan bitwise_and bitwise_or bitwise_xor bitwise_not
    logical_and logical_or logical_not logical_xor where where_method masked_fill to float double half bfloat16
    long int short bool type_as clone contiguous detach zeros_like ones_like full_like randn_like rand_like
"""

RULES: dict[str, Rule] = {
    **_words(_ELEMENTWISE, _elementwise),
    **_words("sum nansum mean nanmean prod std var amax amin argmax argmin count_nonzero all any", _along(1)),
    **_words("logsumexp cumsum cumprod softmax log_softmax softmin logcumsumexp", _along(1)),
    **dict.fromkeys(("median", "max", "min"), _extreme),
    **dict.fromkeys(("norm", "linalg_norm", "vector_norm"), _along(2)),
    "topk": _along(2, -1),
    "sort": _along(1, -1),
    "argsort": _along(1, -1),
    "normalize": _along(2, 1),
    "cosine_similarity": _along(2, 1, operands=2),
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm"), _matmul),
    "linear": _linear,
    "outer": _outer,
    "einsum": _einsum,
    "getitem": getitem,
    "setitem": setitem,
    "set_view": set_view,
    **dict.fromkeys(STEPS, stepped),
    "squeeze": _squeezed,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "ravel"), _reshaped),
    **dict.fromkeys(("expand", "repeat"), _repeated),
    "expand_as": _elementwise,
    **dict.fromkeys(("gather", "take_along_dim", "scatter", "scatter_add"), _of_rows),
    "index_select": _other_dim(1),
    "repeat_interleave": _other_dim(2),
    "flip": _other_dim(1),
    "roll": _other_dim(2),
    **dict.fromkeys(("tril", "triu"), _last_two),
    **dict.fromkeys(("cat", "stack"), _joined),
    "item": _item,
    "one_hot": _same,
}
