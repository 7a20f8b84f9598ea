"""Shapes in an edit, which is written before there are prompts: how many and how long these are is open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line


class OpenShape(tuple[int, ...]):
    """A shape of which some dimensions are those of later prompts. Using one of these as a number is refused."""

    open: frozenset[int]  # the dimensions that are
    told: str  # why they are

    def __getitem__(self, key: Any) -> Any:
        chosen = range(len(self))[key]
        if self.open.intersection([chosen] if isinstance(chosen, int) else chosen):
            _refuse(self)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[int]:
        if self.open:
            _refuse(self)
        return super().__iter__()

    def __repr__(self) -> str:
        return f"[{', '.join('?' if dim in self.open else str(self[dim]) for dim in range(len(self)))}]"


BY_PROMPT = "the prompts of later traces, which an edit does not know"
BY_STEP = "the step, and this body is recorded once for step 0, the prompts, and later ones"


def opened(one: tuple[int, ...], other: tuple[int, ...], told: str = BY_PROMPT) -> tuple[int, ...]:
    """The shape that two have, with two choices of prompts: what differs between them follows from the prompts."""
    if len(one) != len(other):
        raise GraphError(
            f"how many dimensions this value has depends on {told}: keep dimensions of size 1", where=user_line()
        )
    shape = OpenShape(one)
    shape.told = told
    shape.open = frozenset(dim for dim, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return shape if shape.open else one


def is_open(shape: tuple[int, ...], dim: int) -> bool:
    """Whether a dimension is that of later prompts."""
    return isinstance(shape, OpenShape) and dim in shape.open


def _refuse(shape: OpenShape) -> None:
    raise GraphError(
        f"this value's shape is {shape!r}: where `?` stands it follows from {shape.told}. Name dimensions from the "
        "end, and write -1, `.unflatten(-1, ...)` or `.flatten(-2)`",
        where=user_line(),
    )
