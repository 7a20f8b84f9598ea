"""Where the prompts' dimension goes under an index, an assignment to a part, and a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polytrace.graph import Op, Operand, Ref, refs
from polytrace.maps.row_values import Dim, MixesError, Rows, RowTensor, Shape


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part.start in (None, 0) and part.stop is None and part.step in (None, 1)


def picked(walk: Rows, rank: int, dim: int, index: Operand) -> tuple[int, int]:
    """The prompts' dimension of `base[index]`, and how many dimensions that has."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(walk.dims[part] is not None for part in refs(tuple(parts))):
        raise MixesError  # what a prompt picks by its own values: gather does that
    widths = [_width(walk, part) for part in parts]
    if Ellipsis not in [part for part in parts if not isinstance(part, (list, Ref))]:
        parts, widths = [*parts, Ellipsis], [*widths, 0]
    kept: list[int | str | None] = []  # base dimension, None for a new one, "index" for what index tensors take
    place = broadcast = 0
    for part, width in zip(parts, widths, strict=True):
        if part is Ellipsis:
            rest = rank - sum(widths)
            kept.extend(range(place, place + rest))
            place += rest
            continue
        if place <= dim < place + width and not _is_whole(part):
            raise MixesError
        if part is None:
            kept.append(None)
        elif isinstance(part, slice):
            kept.append(place)
        elif isinstance(part, (list, Ref)):
            kept.append("index")
            broadcast = max(broadcast, _index_rank(walk, part))
        place += width
    tensors = [spot for spot, entry in enumerate(kept) if entry == "index"]
    if tensors:
        first = tensors[0] if tensors[-1] - tensors[0] + 1 == len(tensors) else 0
        rest_of = [entry for entry in kept if entry != "index"]
        kept = [*rest_of[:first], *[None] * broadcast, *rest_of[first:]]
    return kept.index(dim), len(kept)


def _width(walk: Rows, part: Any) -> int:
    """How many dimensions a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Ref):
        shape = walk.shapes[part.node]
        return len(shape.shape) if shape is not None and shape.dtype in ("bool", "uint8") else 1
    if isinstance(part, bool) or (isinstance(part, list) and not all(type(one) is int for one in flat(part))):
        raise MixesError
    return 1


def _index_rank(walk: Rows, part: Any) -> int:
    if isinstance(part, Ref):
        shape = walk.shapes[part.node]
        return 1 if shape is None or shape.dtype in ("bool", "uint8") else len(shape.shape)
    depth = 0
    while isinstance(part, list):
        depth, part = depth + 1, part[0] if part else None
    return depth


def flat(part: Any) -> list[Any]:
    return [one for member in part for one in flat(member)] if isinstance(part, (list, tuple)) else [part]


def getitem(walk: Rows, op: Op, result: Shape) -> Dim:
    base, index = walk.tensor(op.args[0]), op.args[1]
    if base.dim is None and isinstance(index, Ref):  # rows of a table, by each prompt's own number
        shape = walk.shapes[index.node]
        if shape is None or shape.dtype not in ("int64", "int32"):
            raise MixesError
        return walk.dims[index.node]
    return picked(walk, base.rank, base.rows, index)[0]


def setitem(walk: Rows, op: Op, result: Shape) -> Dim:
    base = walk.tensor(op.args[0])
    index, value = op.args[1], walk.tensor(op.args[2])
    mask = walk.tensor(index)
    if mask.dim is not None:  # places that a prompt's own mask picks, all given one number
        shape = walk.shapes[index.node] if isinstance(index, Ref) else None
        if shape is None or shape.dtype != "bool" or mask.dim != base.rows or value.rank:
            raise MixesError
        return base.rows
    _check_part(*picked(walk, base.rank, base.rows, index), value)
    return base.rows


def _check_part(dim: int, rank: int, value: RowTensor) -> None:
    """What is put into a part lies along the part's prompts, or is the same for all."""
    if value.dim is not None and rank - value.rank + value.dim != dim:
        raise MixesError
    place = dim - (rank - value.rank)
    if value.dim is None and 0 <= place < value.rank and value.shape[place] != 1:
        raise MixesError


def set_view(walk: Rows, op: Op, result: Shape) -> Dim:
    base, steps = walk.tensor(op.args[0]), op.args[1]
    assert isinstance(steps, tuple)
    dim, rank = base.rows, base.rank
    for step in steps:
        assert isinstance(step, tuple)
        name, args, kwargs = step
        assert isinstance(name, str) and isinstance(args, tuple) and isinstance(kwargs, tuple)
        if name == "getitem":
            dim, rank = picked(walk, rank, dim, args[0])
        elif name != "item":
            rule = STEPS.get(name)
            if rule is None:
                raise MixesError
            named: dict[str, Any] = {str(key): value for key, value in kwargs}  # type: ignore[misc,str-unpack]
            dim, rank = rule(dim, rank, args, named)
    _check_part(dim, rank, walk.tensor(op.args[2]))
    return base.rows


# --- views, by the number of dimensions alone: (prompts' dimension, dimensions, arguments) -> the first two afterwards

Step = Callable[[int, int, Sequence[Any], Mapping[str, Any]], tuple[int, int]]


def _order_step(order: Callable[[int, Sequence[Any], Mapping[str, Any]], list[int]]) -> Step:
    def step(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        return order(rank, args, kwargs).index(dim), rank

    return step


def named(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    """Arguments by place or by name."""
    return [kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)]


def _swapped(rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    order = list(range(rank))
    first, second = named(args, kwargs, "dim0", "dim1") if args or kwargs else (0, -1)
    order[first], order[second] = order[second], order[first]
    return order


def _permuted(rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    dims = kwargs.get("dims", args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
    return [dim % rank for dim in dims]


def _moved(rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    source, target = ([one] if type(one) is int else one for one in named(args, kwargs, "source", "destination"))
    places = {to % rank: dim % rank for dim, to in zip(source, target, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in places.values())
    return [places[place] if place in places else next(rest) for place in range(rank)]


def _unsqueezed(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    (at,) = named(args, kwargs, "dim")
    return dim + (at % (rank + 1) <= dim), rank + 1


def _without(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """select and unbind take a dimension away; unbind's is the first where none is said."""
    at = kwargs.get("dim", args[0] if args else 0) % rank
    if at == dim:
        raise MixesError
    return dim - (at < dim), rank - 1


def _within(place: int) -> Step:
    """A part of one dimension, argument number `place`."""

    def step(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        if kwargs.get("dim", args[place] if len(args) > place else 0) % rank == dim:
            raise MixesError
        return dim, rank

    return step


def _within_number(number: int) -> Step:
    """hsplit and the like: parts of one dimension; hsplit's is the first where there is one only."""
    return lambda dim, rank, args, kwargs: _within(0)(dim, rank, (min(number, rank - 1),), {})


STEPS: dict[str, Step] = {
    "transpose": _order_step(_swapped),
    "adjoint": _order_step(lambda rank, args, kwargs: _swapped(rank, (-2, -1), {})),
    "t": _order_step(lambda rank, args, kwargs: list(range(rank))[::-1]),
    "permute": _order_step(_permuted),
    "movedim": _order_step(_moved),
    "unsqueeze": _unsqueezed,
    "select": _without,
    "unbind": _without,
    "narrow": _within(0),
    "narrow_copy": _within(0),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _within(1)),
    **{f"{letter}split": _within_number(number) for letter, number in (("v", 0), ("h", 1), ("d", 2))},
}


def stepped(walk: Rows, op: Op, result: Shape) -> Dim:
    base = walk.tensor(op.args[0])
    if any(isinstance(part, Ref) for part in (*op.args[1:], *op.kwargs.values())):
        raise MixesError
    return STEPS[op.name](base.rows, base.rank, op.args[1:], op.kwargs)[0]
