"""How much of a grid is tried: every value of every axis by `make test`, every cell by `make test-wide`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest

is_wide = False  # set by conftest, before any test module is imported


def wide(*values: Any, id: str | None = None) -> Any:
    """A cell that takes the same way through the code as one that is always tried."""
    return pytest.param(*values, marks=pytest.mark.wide, id=id)


def keeping(cells: Iterable[Any], is_kept: Callable[[Any], bool]) -> list[Any]:
    """All cells; those that are not kept are wide."""
    return [cell if is_kept(cell) else wide(*cell) if isinstance(cell, tuple) else wide(cell) for cell in cells]


def covering(*axes: Sequence[Any], shift: int = 0) -> list[Any]:
    """All cells of a grid; each value of each axis is in one at least that is not wide.

    Along the diagonal; another `shift` moves the axes behind the first one against it.
    """
    longest = max(map(len, axes))
    kept = {tuple((number + shift * place) % len(axis) for place, axis in enumerate(axes)) for number in range(longest)}
    cells = product(*(range(len(axis)) for axis in axes))
    return [(pytest.param if cell in kept else wide)(*map(_at, axes, cell)) for cell in cells]


def examples(few: int, many: int) -> int:
    """How many of Hypothesis' examples are tried."""
    return many if is_wide else few


def _at(axis: Sequence[Any], place: int) -> Any:
    return axis[place]
