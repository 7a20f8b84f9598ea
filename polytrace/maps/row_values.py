"""What the tracker of prompts (`rowwise`) knows while it walks a graph: shapes, and where prompts are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from polytrace.certificate import ValueShape
from polytrace.graph import NodeId, Op, Operand, Ref, operands

Shape = tuple[int, ...]
Dim = int | None  # where the prompts' dimension is; None: the value has nothing of a prompt


class MixesError(Exception):
    """A rule that does not hold."""


@dataclass(frozen=True, slots=True)
class RowTensor:
    """An operand: its shape and where its prompts are."""

    shape: Shape
    dim: Dim

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def place(self) -> tuple[int, Dim]:
        """How many dimensions it has, and which is the prompts'."""
        return self.rank, self.dim

    @property
    def rows(self) -> int:
        """The prompts' dimension of an operand that must have one."""
        if self.dim is None:
            raise MixesError
        return self.dim


class Rows:
    """The values so far."""

    def __init__(self, shapes: Sequence[ValueShape | None]) -> None:
        self.shapes = shapes  # of all nodes
        self.dims: list[Dim] = []  # of the nodes so far

    def tensor(self, operand: Operand) -> RowTensor:
        if not isinstance(operand, Ref):
            return RowTensor((), None)
        shape = self.shapes[operand.node]
        return RowTensor(shape.shape if shape is not None else (), self.dims[operand.node])

    def operands(self, op: Op) -> list[RowTensor]:
        """The values that an op needs."""
        return [self.tensor(Ref(node)) for node in operands(op)]

    def rank(self, node: NodeId) -> int:
        """How many dimensions a value has."""
        return self.tensor(Ref(node)).rank


Rule = Callable[[Rows, Op, Shape], Dim]  # with the result's shape; of several results one's


def argument(op: Op, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or by name."""
    return op.kwargs.get(name, op.args[place] if len(op.args) > place else default)


def only(dims: Iterable[Dim]) -> int:
    """The one dimension that all operands with prompts agree on."""
    found = {dim for dim in dims if dim is not None}
    if len(found) != 1:
        raise MixesError
    return found.pop()
