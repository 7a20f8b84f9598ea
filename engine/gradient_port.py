"""Gradients at one port during one visit of a pass that runs backwards, and the turns that graphs take there.

Owns what a turn does to the gradients of the rows that it is about. Knows neither sites nor requests: `engine.turns`
brings rows and values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.copies import to_device
from engine.leaves import with_rows_second
from engine.views import RowView

# T = packed rows


class Gradient(Protocol):
    """What has come to one tensor of a port. Values have the shape that a read of the rows has there."""

    def take(self, rows: RowView, *, is_assigned: bool) -> Tensor:
        """What was written there is to get its gradient: it goes no further back.

        `is_assigned`: what was written is handed on by the port, and nobody else has it.
        """

    def add(self, rows: RowView, value: Tensor, *, behind: Sequence[RowView]) -> None:
        """What was read there gives this. `behind`: rows that were assigned before, at the same visit."""

    def look(self, rows: RowView, *, behind: Sequence[RowView]) -> Tensor:
        """The total with regard to what was read."""

    def set(self, rows: RowView, value: Tensor, *, behind: Sequence[RowView]) -> None:
        """The total becomes another."""


class GradientPort:
    """The gradients of a port's tensors."""

    def __init__(self, gradients: Mapping[Selector, Gradient]) -> None:
        self.gradients = gradients


class PortGradient(ABC):
    """Of what nobody holds but those who get it from the port: what is read of it and put there is all."""

    def take(self, rows: RowView, *, is_assigned: bool) -> Tensor:
        value = self._read(rows)
        self._put(rows, torch.zeros_like(value))
        return value

    def add(self, rows: RowView, value: Tensor, *, behind: Sequence[RowView]) -> None:
        self._put(rows, self._read(rows) + value)

    def look(self, rows: RowView, *, behind: Sequence[RowView]) -> Tensor:
        return self._read(rows)

    def set(self, rows: RowView, value: Tensor, *, behind: Sequence[RowView]) -> None:
        self._put(rows, value)

    @abstractmethod
    def _read(self, rows: RowView) -> Tensor:
        """What has come to rows, a tensor of its own."""

    @abstractmethod
    def _put(self, rows: RowView, value: Tensor) -> None:
        """It is this from now on."""


class RowGradient:
    """Of a tensor that has rows: what came to those who held it, and to what was handed on."""

    def __init__(self, handed: Tensor, held: Tensor | None, row_dim: int) -> None:
        """`held`: None where all who have it got it from the port. `row_dim`: the dimension of their rows."""
        self.handed, self.held = handed, held
        self._handed_1T = with_rows_second(handed, row_dim)
        self._held_1T = None if held is None else with_rows_second(held, row_dim)

    def take(self, rows: RowView, *, is_assigned: bool) -> Tensor:
        value = rows.read(self._handed_1T).clone()
        _put(self._handed_1T, rows, torch.zeros_like(value))
        if self._held_1T is not None and not is_assigned:
            value += rows.read(self._held_1T)
            _put(self._held_1T, rows, torch.zeros_like(value))
        return value

    def add(self, rows: RowView, value: Tensor, *, behind: Sequence[RowView]) -> None:
        where = self._handed_1T if behind or self._held_1T is None else self._held_1T
        _put(where, rows, rows.read(where) + value)

    def look(self, rows: RowView, *, behind: Sequence[RowView]) -> Tensor:
        value = rows.read(self._handed_1T).clone()
        if self._held_1T is not None:
            others = rows.read(self._held_1T)
            value += _without(others, rows, behind)
        return value

    def set(self, rows: RowView, value: Tensor, *, behind: Sequence[RowView]) -> None:
        if self._held_1T is not None:  # who held it before an assignment keeps what is not the read's
            others = rows.read(self._held_1T)
            _put(self._held_1T, rows, torch.where(_among(rows, behind, others), others, 0))
        _put(self._handed_1T, rows, value)


def _without(values: Tensor, rows: RowView, behind: Sequence[RowView]) -> Tensor:
    """Values of rows with zeros where the row is one of those."""
    return torch.where(_among(rows, behind, values), 0, values) if behind else values


def _among(rows: RowView, others: Sequence[RowView], like: Tensor) -> Tensor:
    """Which cells' rows are among those of others, with the dimensions of `like`."""
    theirs = {row for view in others for row in view.numbers}
    cells = torch.zeros(rows.shape[0] * rows.shape[1], dtype=torch.bool)
    cells[[place for place, row in zip(rows.places, rows.numbers, strict=True) if row in theirs]] = True
    return to_device(cells, like.device).view(*rows.shape, *[1] * (like.ndim - 2))


def _put(packed_1T: Tensor, rows: RowView, value: Tensor) -> None:
    if rows.is_run:
        rows.read(packed_1T).copy_(value)
    elif rows.num_rows:
        packed_1T[0].index_copy_(0, rows.rows, rows.part(value).to(packed_1T.dtype))
