"""What a row of the op table says of an operation, and the short ways to write one. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Results(Enum):
    """How many values a call of an op returns."""

    ONE = "one"
    NAMED = "named"  # one for each of `fields`
    PAIR_WITH_DIM = "pair-with-dim"  # a pair of `fields` when `dim` is given, else one (max, min, median)
    LIST = "list"  # as many as the shapes say (split, chunk, unbind)


class Cost(Enum):
    """What a call takes, by the class of its work; `scheduling.op_costs` has the arithmetic."""

    FREE = "free"  # views, copies, casts, placements: nothing is computed
    ELEMENT = "element"  # a few operations for each element of the operands and results
    SORT = "sort"  # n log n along a dimension
    PRODUCT = "product"  # multiply and add
    TRANSFORM = "transform"  # a Fourier transform
    DECOMPOSITION = "decomposition"  # the cube of a matrix


class Reach(Enum):
    """How far a place of the result looks into the operands: what rows of tokens an op may mix."""

    PLACE = "place"  # the same place of each operand, broadcast; or dimensions in another order
    MOVED = "moved"  # one place of an operand, but another one: picked, repeated, turned round, put between others
    DIM = "dim"  # all places along a dimension that the arguments name (`dim_place`, `dim_default`)
    LAST = "last"  # all places of the last `num_last` dimensions
    SHAPE = "shape"  # all places of the last dimensions, as many as `normalized_shape` has
    CONTRACTED = "contracted"  # the dimensions that a product sums over
    LOSS = "loss"  # everything, or with reduction="none" the place and its classes
    WHOLE = "whole"  # anything: what is not said to be tamer


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """One row of the table."""

    name: str
    torch: tuple[str, ...]  # recorded from these: "Tensor.add", "torch.add", "functional.softmax", "linalg.norm"
    kwargs: frozenset[str] = frozenset()  # keyword arguments allowed on the wire
    first: tuple[str, ...] = ()  # keywords that a user may give the first argument by; it travels by position
    results: Results = Results.ONE
    fields: tuple[str, ...] = ()  # names of the results, where there are several of a fixed number
    is_view: bool = False  # the result aliases the first operand's memory, so in-place code on it reaches the base
    is_random: bool = False  # draws; what, depends on the request's seed and the keyword `draw` alone
    is_made: bool = False  # makes a tensor of sizes alone, without an operand
    needs_values: bool = False  # the result's shape depends on values: taken where they are known before the run
    cost: Cost = Cost.ELEMENT
    reach: Reach = Reach.WHOLE
    dim_place: int = 1  # of `dim` among the positional arguments
    dim_default: int | tuple[int, ...] | None = None  # `dim` where it is not given; None: all dimensions
    num_last: int = 0


VALUES_AND_INDICES = ("values", "indices")


def op(name: str, *kwargs: str, torch: str = "both", **more: object) -> OpSpec:
    """A row. `torch` says what is recorded as it, in words: "both" (method and function), "method", "function", a room
    ("functional", "linalg", "special", "fft") for its function of this name, or a name as it is ("torch.rsub").
    """
    names: list[str] = []
    for word in torch.split():
        if "." in word:
            names.append(word)
            continue
        rooms = {"both": ("Tensor", "torch"), "method": ("Tensor",), "function": ("torch",)}.get(word, (word,))
        names.extend(f"{room}.{name}" for room in rooms)
    return OpSpec(name=name, torch=tuple(names), kwargs=frozenset(kwargs), **more)  # type: ignore[arg-type]


def element(name: str, *kwargs: str, torch: str = "both", **more: object) -> OpSpec:
    """A row of an op that works element by element, on operands that broadcast."""
    return op(name, *kwargs, torch=torch, **{"reach": Reach.PLACE, **more})


def operator(name: str, *kwargs: str, dunders: str, aliases: str = "") -> OpSpec:
    """An operator: the method, the function and Python's double-underscore names for it."""
    names = [f"Tensor.{name}", f"torch.{name}", *(f"Tensor.__{d}__" for d in dunders.split()), *aliases.split()]
    return element(name, *kwargs, torch=" ".join(names))


def along(
    name: str,
    *kwargs: str,
    torch: str = "both",
    at: int = 1,
    default: int | tuple[int, ...] | None = None,
    **more: object,
) -> OpSpec:
    """A row of an op that runs over `dim`, the positional argument number `at`; without it over `default`."""
    return op(name, *kwargs, torch=torch, **{"reach": Reach.DIM, "dim_place": at, "dim_default": default, **more})


def view(name: str, *kwargs: str, torch: str = "both", **more: object) -> OpSpec:
    """A row of an op whose result is a view of its first operand."""
    return op(name, *kwargs, torch=torch, **{"is_view": True, "cost": Cost.FREE, "reach": Reach.PLACE, **more})


def moved(name: str, *kwargs: str, torch: str = "both", **more: object) -> OpSpec:
    """A row of an op that puts elements elsewhere and computes nothing."""
    return op(name, *kwargs, torch=torch, **{"cost": Cost.FREE, "reach": Reach.MOVED, **more})


def matrix(name: str, *kwargs: str, torch: str = "linalg", **more: object) -> OpSpec:
    """A row of an op on matrices: the last two dimensions of its operands."""
    usual = {"cost": Cost.DECOMPOSITION, "reach": Reach.LAST, "num_last": 2}
    return op(name, *kwargs, torch=torch, **{**usual, **more})
