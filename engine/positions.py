"""Positions for modules that number a sequence's tokens themselves, as they lie in the stream, when nobody tells them.

A root forward takes `position_ids` as a rule, and the engine gives them. Two kinds of embeddings need more: those of
decoders whose root forward takes none, and those that begin to count behind their padding's index, which they do only
where they are given no positions. Found by what forwards take, never by a family's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_NAME = "position_ids"
_COUNTS_BEHIND_PADDING = "create_position_ids_from_input_ids"


Hook = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]  # in front of a module: the arguments that it gets


@dataclass(frozen=True, slots=True)
class Numbered:
    """A module that gets its positions from here."""

    module: nn.Module
    first: int  # position of a sequence's first token


def numbered_modules(model: nn.Module) -> list[Numbered]:
    """Of a whole model or a stage's window of it."""
    root_takes = _NAME in inspect.signature(model.forward).parameters
    found = []
    for module in model.modules():
        if module is model or _NAME not in inspect.signature(module.forward).parameters:
            continue
        padding = getattr(module, "padding_idx", None)
        if hasattr(module, _COUNTS_BEHIND_PADDING) and isinstance(padding, int):
            found.append(Numbered(module, padding + 1))
        elif not root_takes and next(module.children(), None) is None:
            found.append(Numbered(module, 0))
    return found


def first_position(model: nn.Module) -> int:
    """The number of a sequence's first token in the model's table of positions."""
    return max((one.first for one in numbered_modules(model)), default=0)


def numbering(numbered: Sequence[Numbered], positions_1T: Tensor) -> Iterator[tuple[nn.Module, Hook]]:
    """Modules and the pre-hooks (with keywords) that give them the rows' positions, in the shape that they expect."""
    for one in numbered:
        yield one.module, _giving(one, positions_1T + one.first)


def _giving(one: Numbered, positions_1T: Tensor) -> Hook:
    signature = inspect.signature(one.module.forward)

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = signature.bind(*args, **kwargs)
        given = call.arguments.get(_NAME)
        is_flat = isinstance(given, Tensor) and given.ndim == 1
        call.arguments[_NAME] = positions_1T[0] if is_flat else positions_1T
        return call.args, call.kwargs

    return hook
