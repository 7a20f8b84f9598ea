"""Where the prompts' dimension of an op's operands is in its result, of ops of which their reach does not say it."""

from __future__ import annotations

from math import prod

from polytrace.graph import Op, Ref, operands
from polytrace.maps.row_indices import STEPS, flat, getitem, set_view, setitem, stepped
from polytrace.maps.row_reach import aligned, batched, of_first
from polytrace.maps.row_values import Dim, MixesError, Rows, Rule, Shape, argument, only
from polytrace.ops.contractions import contracted, einsum_terms, reduced_dims


def _free(walk: Rows, op: Op, result: Shape) -> Dim:
    """inner, tensordot: what is not summed of the left, then of the right."""
    summed = dict(contracted(op, walk.rank))
    found: list[Dim] = []
    start = 0
    for part in op.args[:2] if len(op.args) > 1 else (op.args[0], op.kwargs["other"]):
        tensor = walk.tensor(part)
        gone = summed[part.node] if isinstance(part, Ref) else set()
        if tensor.dim is not None:
            found.append(start + tensor.dim - sum(dim < tensor.dim for dim in gone))
        start += tensor.rank - len(gone)
    return only(found)


def _outer(walk: Rows, op: Op, result: Shape) -> Dim:
    left, right = (walk.tensor(part) for part in (op.args[0], argument(op, 1, "vec2")))
    return only((left.dim, None if right.dim is None else 1))


def _einsum(walk: Rows, op: Op, result: Shape) -> Dim:
    terms, right, parts = einsum_terms(op)
    tensors = [walk.tensor(part) for part in parts]
    widest = max(tensor.rank - len(term.replace("...", "")) for term, tensor in zip(terms, tensors, strict=True))
    letters = [_letters(term, tensor.rank) for term, tensor in zip(terms, tensors, strict=True)]
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


def _last_two(walk: Rows, op: Op, result: Shape) -> Dim:
    """Batches of matrices, of which rows or columns are told apart."""
    dim, rank = batched(walk, op, result), walk.tensor(op.args[0]).rank
    if dim is None or dim >= rank - 2:
        raise MixesError
    return dim


def _attention(walk: Rows, op: Op, result: Shape) -> Dim:
    """The last two dimensions are rows and features; a mask is stretched."""
    parts = [argument(op, place, name) for place, name in enumerate(("query", "key", "value"))]
    query, *others = map(walk.tensor, parts)
    mask = walk.tensor(argument(op, 3, "attn_mask"))
    is_own = mask.dim is not None and mask.dim - mask.rank != query.rows - query.rank
    if query.rows >= query.rank - 2 or any(one.place != query.place for one in others) or is_own:
        raise MixesError
    return query.rows


def _bilinear(walk: Rows, op: Op, result: Shape) -> Dim:
    base, other = map(walk.tensor, (op.args[0], op.args[1]))
    if base.rows == base.rank - 1 or other.place != base.place:
        raise MixesError
    if any(walk.dims[part] is not None for part in operands(op)[2:]):
        raise MixesError
    return base.rows


def _diagonal(walk: Rows, op: Op, result: Shape) -> Dim:
    """The two dimensions go, and the diagonal is last."""
    dim = walk.tensor(op.args[0]).rows
    ((_, dims),) = reduced_dims(op, walk.rank)
    return dim - sum(one < dim for one in dims)


# what a sample has at the least, where the first dimension of more is of samples
_SAMPLES = {
    **dict.fromkeys(("conv1d", "conv_transpose1d", "avg_pool1d", "max_pool1d", "lp_pool1d"), 2),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_max_pool1d", "fold", "interpolate"), 2),
    **dict.fromkeys(("conv2d", "conv_transpose2d", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "im2col"), 3),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), 3),
    "conv3d": 4,
    **dict.fromkeys(("batch_norm", "group_norm", "multinomial"), 1),
    **dict.fromkeys(("instance_norm", "local_response_norm"), 2),
}


def _of_samples(walk: Rows, op: Op, result: Shape) -> Dim:
    dim = of_first(walk, op, result)
    is_across = op.name == "batch_norm" and argument(op, 5, "training", False)  # by means over samples
    if is_across or dim != 0 or walk.tensor(op.args[0]).rank <= _SAMPLES[op.name]:
        raise MixesError
    return dim


def _squeezed(walk: Rows, op: Op, result: Shape) -> Dim:
    """Without `dim` the prompts' dimension would go where there is one prompt, and stay where there are two."""
    base, at = walk.tensor(op.args[0]), argument(op, 1, "dim")
    if type(at) is not int or at % base.rank == base.rows:
        raise MixesError
    return base.rows - (len(result) < base.rank and at % base.rank < base.rows)


def _reshaped(walk: Rows, op: Op, result: Shape) -> Dim:
    """Row-major: the prompts' dimension is where as many elements are before it as there were."""
    base = walk.tensor(op.args[0])
    before = prod(base.shape[: base.rows])
    fitting = [place for place, size in enumerate(result) if size == 1 and prod(result[:place]) == before]
    if any(walk.dims[part] not in fitting for part in operands(op)[1:]):  # of what says the shape
        raise MixesError
    return only((*fitting[:1], *(walk.dims[part] for part in operands(op)[1:])))


def _made_like(walk: Rows, op: Op, result: Shape) -> Dim:
    """Of a size that is written down: the value's own has its prompts, another has none."""
    base = walk.tensor(op.args[0])
    return base.dim if result == base.shape else None


def _cast(walk: Rows, op: Op, result: Shape) -> Dim:
    """What another value gives is its dtype alone."""
    return walk.tensor(op.args[0]).dim


def _least_three(walk: Rows, op: Op, result: Shape) -> Dim:
    base = walk.tensor(op.args[0])
    return base.rows + (base.rank == 1)


def _of_rows(walk: Rows, op: Op, result: Shape) -> Dim:
    """gather, scatter: every tensor has each prompt's own."""
    base = walk.tensor(op.args[0])
    at = argument(op, 2 if op.name == "take_along_dim" else 1, "dim")
    if type(at) is not int or at % base.rank == base.rows:
        raise MixesError
    if any(tensor.place != base.place for tensor in walk.operands(op)):
        raise MixesError
    return base.rows


def _by_numbers(walk: Rows, op: Op, result: Shape) -> Dim:
    """index_add, index_copy: each prompt's own source is put at places that are the same for all."""
    base, index = walk.tensor(op.args[0]), walk.tensor(argument(op, 2, "index"))
    source = walk.tensor(argument(op, 3, "source"))
    if index.dim is not None or source.place != base.place:
        raise MixesError
    return base.rows


def _other_dim(place: int, name: str = "dim", default: int | tuple[int, ...] | None = None) -> Rule:
    """flip, roll, index_select, ...: along dimensions that are said, by numbers that are the same for all prompts."""

    def rule(walk: Rows, op: Op, result: Shape) -> Dim:
        base = walk.tensor(op.args[0])
        given = op.args[place:] if op.name == "flip" else argument(op, place, name, default)
        over = flat(op.kwargs.get(name, given))
        if not all(type(one) is int for one in over) or base.rows in {one % base.rank for one in over}:
            raise MixesError
        return of_first(walk, op, result)

    return rule


def _padded(walk: Rows, op: Op, result: Shape) -> Dim:
    """Two numbers for each dimension, the last first."""
    base, sizes = walk.tensor(op.args[0]), argument(op, 1, "pad")
    if not isinstance(sizes, (tuple, list)) or base.rows >= base.rank - len(sizes) // 2:
        raise MixesError
    return of_first(walk, op, result)


_JOINED_ALONG = {"hstack": 1, "column_stack": 1, "vstack": 0, "dstack": 2}  # of values with two dimensions or more


def _joined(walk: Rows, op: Op, result: Shape) -> Dim:
    parts, at = op.args[0], argument(op, 1, "dim", _JOINED_ALONG.get(op.name, 0))
    assert isinstance(parts, (tuple, list)) and type(at) is int
    tensors = [walk.tensor(part) for part in parts]
    dim = only(tensor.rows for tensor in tensors)
    if op.name == "stack":
        return dim + (at % len(result) <= dim)
    if op.name in _JOINED_ALONG and min(tensor.rank for tensor in tensors) < 2:
        raise MixesError
    if at % len(result) == dim:
        raise MixesError
    return dim


def _put_part(walk: Rows, op: Op, result: Shape) -> Dim:
    """select_scatter, slice_scatter: each prompt's own part."""
    base, part, at = walk.tensor(op.args[0]), walk.tensor(argument(op, 1, "src")), argument(op, 2, "dim", 0)
    goes = op.name == "select_scatter"
    if at % base.rank == base.rows or part.rows != base.rows - (goes and at % base.rank < base.rows):
        raise MixesError
    return base.rows


def _chosen(walk: Rows, op: Op, result: Shape) -> Dim:
    """One side, whole: by a number that is the same for all, or by each prompt's own."""
    return only(walk.tensor(part).dim for part in op.args[1:])


def _item(walk: Rows, op: Op, result: Shape) -> Dim:
    return walk.tensor(op.args[0]).rows


def _words(text: str, rule: Rule) -> dict[str, Rule]:
    """One rule for many ops."""
    return dict.fromkeys(text.split(), rule)


BY_NAME: dict[str, Rule] = {
    "getitem": getitem,
    "setitem": setitem,
    "set_view": set_view,
    "item": _item,
    "cond": _chosen,
    **dict.fromkeys(STEPS, stepped),
    "squeeze": _squeezed,
    **_words("view view_as reshape reshape_as flatten unflatten ravel", _reshaped),
    **_words("repeat tile broadcast_tensors", aligned),
    "atleast_3d": _least_three,
    **_words("new_zeros new_ones new_full new_empty", _made_like),
    **_words("to type_as", _cast),
    **_words("prelu one_hot embedding view_as_real view_as_complex linear", of_first),
    **_words("tril triu cdist", _last_two),
    **_words("inner tensordot", _free),
    "outer": _outer,
    "einsum": _einsum,
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _attention,
    **_words("diagonal linalg_diagonal", _diagonal),
    **dict.fromkeys(_SAMPLES, _of_samples),
    **_words("gather take_along_dim scatter scatter_add scatter_reduce", _of_rows),
    **_words("index_add index_copy", _by_numbers),
    "index_fill": _other_dim(1),
    "index_select": _other_dim(1),
    "repeat_interleave": _other_dim(2),
    "unfold": _other_dim(1, "dimension"),
    "flip": _other_dim(1, "dims"),
    "fliplr": _other_dim(99, default=1),
    "flipud": _other_dim(99, default=0),
    "roll": _other_dim(2, "dims"),
    "rot90": _other_dim(2, "dims", (0, 1)),
    "pad": _padded,
    **_words("cat stack hstack vstack dstack column_stack", _joined),
    **_words("select_scatter slice_scatter", _put_part),
}
