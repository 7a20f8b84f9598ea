"""Whether a body works on each prompt by itself: the prompts' dimension, followed through every op of its graph.

A body is recorded with one prompt, so every value that has something of it has a dimension of size 1 that stands for
all prompts of a batch. This file follows that dimension. An op that would run over it, pick from it or lose it mixes
prompts; so does every op whose rule is not written here. Then the body means what it says only with all prompts at
once, and the map says so instead of giving each prompt a number of its own.

Knows shapes as they are told and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from polytrace.certificate import ValueShape
from polytrace.graph import Call, Constant, Mask, Node, Op, Operand, Parameter, Read, Ref, Save, Write, operands, refs


class MixesPromptsError(Exception):
    """An op that runs over prompts: its name and the user's line."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"{name} ({where})")
        self.name = name
        self.where = where


Dim = int | None  # where the prompts' dimension is; None: the value has nothing of a prompt


def prompt_dims(nodes: Sequence[Node], shapes: Sequence[ValueShape | None]) -> list[Dim]:
    """Per node, the prompts' dimension. `shapes`: of values for one prompt. Raises MixesPromptsError."""
    walk = _Walk(shapes)
    for node in nodes:
        walk.visit(node)
    return walk.dims


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An operand: its shape and where its prompts are."""

    shape: tuple[int, ...]
    dim: Dim

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def rows(self) -> int:
        """The prompts' dimension of an operand that must have one."""
        if self.dim is None:
            raise _MixesError
        return self.dim


class _MixesError(Exception):
    """A rule that does not hold."""


class _Walk:
    def __init__(self, shapes: Sequence[ValueShape | None]) -> None:
        self.shapes = shapes
        self.dims: list[Dim] = []

    def visit(self, node: Node) -> None:
        name = node.name if isinstance(node, Op) else getattr(node, "module", type(node).__name__.lower())
        try:
            dim = self._dim(node)
            shape = self.shapes[len(self.dims)]
            if dim is not None and shape is not None and not (0 <= dim < len(shape.shape) and shape.shape[dim] == 1):
                raise _MixesError
        except (_MixesError, IndexError, TypeError, ValueError):
            raise MixesPromptsError(name, node.where) from None
        self.dims.append(dim)

    def tensor(self, operand: Operand) -> _Tensor:
        if not isinstance(operand, Ref):
            return _Tensor((), None)
        shape = self.shapes[operand.node]
        return _Tensor(shape.shape if shape is not None else (), self.dims[operand.node])

    def _dim(self, node: Node) -> Dim:
        if isinstance(node, (Read, Mask)):
            return 0
        if isinstance(node, (Constant, Parameter, Save)):
            return None
        if isinstance(node, Write):
            if self.dims[node.value.node] not in (0, None):
                raise _MixesError
            return None
        if all(self.dims[part] is None for part in operands(node)):
            return None
        shape = self.shapes[len(self.dims)]
        result = shape.shape if shape is not None else None
        if isinstance(node, Call):  # a module works row by row, on what its last dimension is
            found = {tensor.dim for tensor in map(self.tensor, node.args)} - {None}
            first = self.tensor(node.args[0])
            if len(found) != 1 or result is None or len(result) != first.rank or first.rows == first.rank - 1:
                raise _MixesError
            return first.rows
        if not isinstance(node, Op):
            raise _MixesError
        rule = _RULES.get(node.name)
        if rule is None:
            raise _MixesError
        return rule(self, node, result)


Rule = Callable[[_Walk, Op, tuple[int, ...] | None], Dim]


def _argument(op: Op, place: int, name: str, default: Any = None) -> Any:
    return op.kwargs.get(name, op.args[place] if len(op.args) > place else default)


def _one(dims: Iterable[Dim]) -> int:
    found = {dim for dim in dims if dim is not None}
    if len(found) != 1:
        raise _MixesError
    return found.pop()


def _elementwise(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """Operands that broadcast: aligned from the right."""
    assert result is not None
    tensors = [walk.tensor(Ref(part)) for part in operands(op)]
    return _one(len(result) - tensor.rank + tensor.dim for tensor in tensors if tensor.dim is not None)


def _along(place: int, default: int | None = None, *, operands: int = 1) -> Rule:
    """Ops that run over `dim`, argument number `place`; without it over `default`, or everything."""

    def rule(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
        tensors = [walk.tensor(arg) for arg in op.args[:operands]]
        rank = max(tensor.rank for tensor in tensors)
        dim = _one(rank - tensor.rank + tensor.dim for tensor in tensors if tensor.dim is not None)
        over = _argument(op, place, "dim", default)
        dims = {one % rank for one in ((over,) if type(over) is int else over or range(rank))}
        if dim in dims or any(isinstance(part, Ref) for part in (*op.args[operands:], *op.kwargs.values())):
            raise _MixesError
        is_kept = bool(op.kwargs.get("keepdim")) or op.name in _KEEPS_RANK or any(arg is True for arg in op.args)
        if result is not None:
            is_kept = len(result) == rank
        return dim if is_kept else dim - sum(one < dim for one in dims)

    return rule


_KEEPS_RANK = frozenset({"topk", "sort"})


def _extreme(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """`max(other)` is element by element, `max(dim)` runs over it."""
    if isinstance(_argument(op, 1, "other"), Ref):
        return _elementwise(walk, op, result)
    return _along(1)(walk, op, result)


def _layer_norm(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base, sizes = walk.tensor(op.args[0]), _argument(op, 1, "normalized_shape")
    if base.rows >= base.rank - len(sizes) or any(walk.tensor(Ref(part)).dim is not None for part in operands(op)[1:]):
        raise _MixesError
    return base.rows


def _matmul(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    assert result is not None
    left, right = (walk.tensor(arg) for arg in (*op.args, op.kwargs.get("other"))[:2])
    if len(operands(op)) > sum(isinstance(arg, Ref) for arg in (*op.args, op.kwargs.get("other"))):
        raise _MixesError  # a factor under another name
    if op.name == "rmatmul":
        left, right = right, left
    found: list[Dim] = []
    for tensor, summed, own in ((left, -1, -2), (right, -2, -1)):
        if tensor.dim is None:
            continue
        from_right = tensor.dim - tensor.rank
        if tensor.rank == 1 or from_right == summed:
            raise _MixesError
        if from_right == own:
            found.append(len(result) - 1 if own == -1 or right.rank == 1 else len(result) - 2)
        else:  # a batch dimension; a factor that is a vector takes its own dimension away
            found.append(len(result) + from_right + (left.rank == 1) + (right.rank == 1))
    return _one(found)


def _linear(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base = walk.tensor(op.args[0])
    others = (*op.args[1:], *op.kwargs.values())
    if base.rows == base.rank - 1 or any(walk.tensor(part).dim is not None for part in others):
        raise _MixesError
    return base.rows


def _outer(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    left, right = (walk.tensor(arg) for arg in op.args)
    return _one((left.dim, None if right.dim is None else 1))


def _einsum(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    equation, *parts = op.args
    if len(parts) == 1 and isinstance(parts[0], (tuple, list)):
        parts = list(parts[0])
    if not isinstance(equation, str) or "->" not in equation:
        raise _MixesError
    left, _, right = equation.replace(" ", "").partition("->")
    tensors = [walk.tensor(part) for part in parts]
    widest = max(
        tensor.rank - len(term.replace("...", "")) for term, tensor in zip(left.split(","), tensors, strict=True)
    )
    letters = [_letters(term, tensor.rank) for term, tensor in zip(left.split(","), tensors, strict=True)]
    letter = {own[tensor.dim] for own, tensor in zip(letters, tensors, strict=True) if tensor.dim is not None}
    if len(letter) != 1:
        raise _MixesError
    (wanted,) = letter
    own_only = [own for own, tensor in zip(letters, tensors, strict=True) if tensor.dim is None]
    if any(wanted in own for own in own_only) or any(own.count(wanted) > 1 for own in letters):
        raise _MixesError
    return _letters(right, len(right.replace("...", "")) + (widest if "..." in right else 0)).index(wanted)


def _letters(term: str, rank: int) -> list[str]:
    """A name for each dimension; those of an ellipsis are counted from its right end."""
    before, dots, after = term.partition("...")
    free = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{place}" for place in range(free, 0, -1)), *after]


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part.start in (None, 0) and part.stop is None and part.step in (None, 1)


def _picked(walk: _Walk, rank: int, dim: int, index: Operand) -> tuple[int, int]:
    """The prompts' dimension of `base[index]`, and how many dimensions that has."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(walk.dims[part] is not None for part in refs(tuple(parts))):
        raise _MixesError  # what a prompt picks by its own values: gather does that
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
            raise _MixesError
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


def _width(walk: _Walk, part: Any) -> int:
    """How many dimensions a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Ref):
        shape = walk.shapes[part.node]
        return len(shape.shape) if shape is not None and shape.dtype in ("bool", "uint8") else 1
    if isinstance(part, bool) or (isinstance(part, list) and not all(type(one) is int for one in _flat(part))):
        raise _MixesError
    return 1


def _index_rank(walk: _Walk, part: Any) -> int:
    if isinstance(part, Ref):
        shape = walk.shapes[part.node]
        return 1 if shape is None or shape.dtype in ("bool", "uint8") else len(shape.shape)
    depth = 0
    while isinstance(part, list):
        depth, part = depth + 1, part[0] if part else None
    return depth


def _flat(part: Any) -> list[Any]:
    return [one for member in part for one in _flat(member)] if isinstance(part, (list, tuple)) else [part]


def _getitem(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base, index = walk.tensor(op.args[0]), op.args[1]
    if base.dim is None and isinstance(index, Ref):  # rows of a table, by each prompt's own number
        shape = walk.shapes[index.node]
        if shape is None or shape.dtype not in ("int64", "int32"):
            raise _MixesError
        return walk.dims[index.node]
    return _picked(walk, base.rank, base.rows, index)[0]


def _setitem(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base = walk.tensor(op.args[0])
    index, value = op.args[1], walk.tensor(op.args[2])
    mask = walk.tensor(index)
    if mask.dim is not None:  # places that a prompt's own mask picks, all given one number
        shape = walk.shapes[index.node] if isinstance(index, Ref) else None
        if shape is None or shape.dtype != "bool" or mask.dim != base.rows or value.rank:
            raise _MixesError
        return base.rows
    _check_part(*_picked(walk, base.rank, base.rows, index), value)
    return base.rows


def _check_part(dim: int, rank: int, value: _Tensor) -> None:
    """What is put into a part lies along the part's prompts, or is the same for all."""
    if value.dim is not None and rank - value.rank + value.dim != dim:
        raise _MixesError
    place = dim - (rank - value.rank)
    if value.dim is None and 0 <= place < value.rank and value.shape[place] != 1:
        raise _MixesError


def _set_view(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base, steps = walk.tensor(op.args[0]), op.args[1]
    assert isinstance(steps, tuple)
    dim, rank = base.rows, base.rank
    for step in steps:
        assert isinstance(step, tuple)
        name, args, kwargs = step
        assert isinstance(name, str) and isinstance(args, tuple) and isinstance(kwargs, tuple)
        if name == "getitem":
            dim, rank = _picked(walk, rank, dim, args[0])
        elif name != "item":
            rule = _STEPS.get(name)
            if rule is None:
                raise _MixesError
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


def _named(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    """Arguments by place or by name."""
    return [kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)]


def _swapped(rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    order = list(range(rank))
    first, second = _named(args, kwargs, "dim0", "dim1") if args or kwargs else (0, -1)
    order[first], order[second] = order[second], order[first]
    return order


def _permuted(rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    dims = kwargs.get("dims", args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
    return [dim % rank for dim in dims]


def _moved(rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    source, target = ([one] if type(one) is int else one for one in _named(args, kwargs, "source", "destination"))
    places = {to % rank: dim % rank for dim, to in zip(source, target, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in places.values())
    return [places[place] if place in places else next(rest) for place in range(rank)]


def _unsqueezed(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    (at,) = _named(args, kwargs, "dim")
    return dim + (at % (rank + 1) <= dim), rank + 1


def _without(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """select and unbind take a dimension away; unbind's is the first where none is said."""
    at = kwargs.get("dim", args[0] if args else 0) % rank
    if at == dim:
        raise _MixesError
    return dim - (at < dim), rank - 1


def _within(place: int) -> Step:
    """A part of one dimension, argument number `place`."""

    def step(dim: int, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        if kwargs.get("dim", args[place] if len(args) > place else 0) % rank == dim:
            raise _MixesError
        return dim, rank

    return step


_STEPS: dict[str, Step] = {
    "transpose": _order_step(_swapped),
    "t": _order_step(lambda rank, args, kwargs: list(range(rank))[::-1]),
    "permute": _order_step(_permuted),
    "movedim": _order_step(_moved),
    "unsqueeze": _unsqueezed,
    "select": _without,
    "unbind": _without,
    "narrow": _within(0),
    "split": _within(1),
    "chunk": _within(1),
}


def _stepped(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base = walk.tensor(op.args[0])
    if any(isinstance(part, Ref) for part in (*op.args[1:], *op.kwargs.values())):
        raise _MixesError
    return _STEPS[op.name](base.rows, base.rank, op.args[1:], op.kwargs)[0]


def _squeezed(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """Without `dim` the prompts' dimension would go where there is one prompt, and stay where there are two."""
    base, at = walk.tensor(op.args[0]), _argument(op, 1, "dim")
    if result is None or type(at) is not int or at % base.rank == base.rows:
        raise _MixesError
    return base.rows - (len(result) < base.rank and at % base.rank < base.rows)


def _reshaped(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """Row-major: the prompts' dimension is where as many elements are before it as there were."""
    assert result is not None
    base = walk.tensor(op.args[0])
    before = prod(base.shape[: base.rows])
    fitting = [place for place, size in enumerate(result) if size == 1 and prod(result[:place]) == before]
    return _one(fitting[:1])


def _repeated(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """`repeat`, `expand`: new dimensions come first. Whether prompts were repeated, their size says."""
    assert result is not None
    base = walk.tensor(op.args[0])
    return len(result) - base.rank + base.rows


def _of_rows(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """gather, scatter: every tensor has each prompt's own."""
    base = walk.tensor(op.args[0])
    at = op.kwargs.get("dim", next((arg for arg in op.args[1:] if type(arg) is int), None))
    if type(at) is not int or at % base.rank == base.rows:
        raise _MixesError
    for part in operands(op):
        tensor = walk.tensor(Ref(part))
        if tensor.dim != base.rows or tensor.rank != base.rank:
            raise _MixesError
    return base.rows


def _other_dim(place: int) -> Rule:
    """flip, roll, index_select, ...: along dimensions that are said, by numbers that are the same for all prompts."""

    def rule(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
        base = walk.tensor(op.args[0])
        dims = _argument(op, place, "dims" if op.name in ("flip", "roll") else "dim")
        over = _flat(dims)
        if not all(type(one) is int for one in over) or base.rows in {one % base.rank for one in over}:
            raise _MixesError
        if any(walk.dims[part] is not None for part in operands(op)[1:]):
            raise _MixesError
        return base.rows

    return rule


def _last_two(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    base = walk.tensor(op.args[0])
    if base.rows >= base.rank - 2:
        raise _MixesError
    return base.rows


def _joined(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    parts, at = op.args[0], _argument(op, 1, "dim", 0)
    assert isinstance(parts, (tuple, list)) and result is not None and type(at) is int
    tensors = [walk.tensor(part) for part in parts]
    dim = _one(tensor.rows for tensor in tensors)
    if op.name == "stack":
        return dim + (at % len(result) <= dim)
    if at % len(result) == dim:
        raise _MixesError
    return dim


def _item(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    return walk.tensor(op.args[0]).rows


def _same(walk: _Walk, op: Op, result: tuple[int, ...] | None) -> Dim:
    """The first operand's dimensions, with others behind them."""
    if any(walk.dims[part] is not None for part in operands(op)[1:]):
        raise _MixesError
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

_RULES: dict[str, Rule] = {
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
    "getitem": _getitem,
    "setitem": _setitem,
    "set_view": _set_view,
    **dict.fromkeys(_STEPS, _stepped),
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
