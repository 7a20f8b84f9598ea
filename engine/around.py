"""The way around a layer: rows whose layer's output is given leave in front of it and join the others again behind it.

So whoever visits the layer's input or output sees all rows of the level, and the layer runs for those that want it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from engine.leaves import first_argument

# T = rows of the level, D = hidden


class Around:
    """One layer in one pass."""

    def __init__(self, inside: Tensor, num_inside: int) -> None:
        """`inside` are the rows of the level that run the layer, and behind `num_inside` padding."""
        self._inside = inside
        self._own = inside[:num_inside]
        self._level: list[Tensor] = []  # the hidden states of all rows, between the two hooks

    def leave(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook in front of the layer: its arguments, for the rows that run it."""
        hidden_1TD = first_argument(args, kwargs)
        self._level.append(hidden_1TD)
        num_rows = hidden_1TD.shape[1]
        return rows_of(args, self._inside, num_rows), rows_of(kwargs, self._inside, num_rows)

    def join(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """A hook behind it: what it made for those, and what the others came with until somebody gives them more."""
        made_1TD = output if isinstance(output, Tensor) else output[0]
        joined_1TD = self._level.pop().to(made_1TD.dtype).index_copy(1, self._own, made_1TD[:, : len(self._own)])
        return joined_1TD if isinstance(output, Tensor) else (joined_1TD, *output[1:])


def rows_of(value: Any, rows: Tensor, num_rows: int) -> Any:
    """A layer's arguments beside the hidden states, for other rows: `[1, ..., T, ...]`, or `[T]` of level 0."""
    if isinstance(value, Tensor):
        behind = next((dim for dim, size in enumerate(value.shape) if size != 1), value.ndim)
        if behind < value.ndim and value.shape[behind] == num_rows and (behind > 0 or value.ndim == 1):
            return value.index_select(behind, rows)
        return value
    if isinstance(value, Mapping):
        return {key: rows_of(member, rows, num_rows) for key, member in value.items()}
    if isinstance(value, (tuple, list)):
        members = [rows_of(member, rows, num_rows) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return value
