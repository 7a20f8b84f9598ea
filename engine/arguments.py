"""What a module was called with: `(args, kwargs)`, and the tensors in it.

The first argument of a module is its `input` port; its `inputs` port has the others, so that no tensor is two sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

Selector = tuple[int | str, ...]
_DEPTH = 4  # keys of a selector at most, as on the wire


class Arguments(NamedTuple):
    """One call. Selectors begin with 0 for a positional argument and with 1 for a keyword's."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def keyword(self) -> str | None:
        """The name of the first argument, when it was given by keyword."""
        return None if self.args else next(iter(self.kwargs), None)

    def tensors(self) -> dict[Selector, Tensor]:
        """The tensors of all arguments."""
        return dict(_tensors(self, ()))

    def others(self) -> dict[Selector, Tensor]:
        """The tensors of all arguments but the first."""
        first = (0, 0) if self.args else (1, self.keyword)
        return {selector: tensor for selector, tensor in _tensors(self, ()) if selector[:2] != first}


class OperationArguments(Arguments):
    """A call of an operation inside of a forward, whose `inputs` are all arguments."""


def _tensors(value: Any, way: Selector) -> Iterator[tuple[Selector, Tensor]]:
    if isinstance(value, Tensor):
        yield way, value
    elif len(way) < _DEPTH and isinstance(value, Mapping):
        for key, member in value.items():
            if isinstance(key, (str, int)):
                yield from _tensors(member, (*way, key))
    elif len(way) < _DEPTH and isinstance(value, (tuple, list)):
        for place, member in enumerate(value):
            yield from _tensors(member, (*way, place))
