"""The tensors in what a module takes or gives, and where each has its rows.

Owns which values are looked into and how deep, and the one form `[1, rows, ...]` that all who read or write ports see.
Knows no site and no plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from engine.arguments import Arguments, OperationArguments, Selector
from engine.head_outputs import HeadOutputs


def port_leaves(value: Any) -> tuple[str, dict[Selector, Tensor]]:
    """The structure of a port's value and the tensors in it, two levels deep."""
    if isinstance(value, OperationArguments):
        return "tuple", value.tensors()
    if isinstance(value, Tensor):
        return "tensor", {(): value}
    if isinstance(value, Arguments):
        return "arguments", value.others()
    if isinstance(value, HeadOutputs):
        return "tensor", {(): value.whole()}
    if isinstance(value, Mapping):
        return "dict", dict(_members(value.items()))
    if isinstance(value, (tuple, list)):
        return type(value).__name__ if type(value) in (tuple, list) else "tuple", dict(_members(enumerate(value)))
    return "other", {}


def row_leaves(value: Any, layouts: Mapping[Selector, int]) -> dict[Selector, Tensor]:
    """The tensors of a port, all with their rows in the second dimension; `layouts` says where others have them."""
    return {
        selector: with_rows_second(own, layouts.get(selector, 1)) for selector, own in port_leaves(value)[1].items()
    }


def with_rows_second(tensor: Tensor, dim: int) -> Tensor:
    """The same memory as `[1, rows, ...]`, of a tensor that has its rows in a dimension: 0 where it has no other."""
    return tensor[None] if dim == 0 else tensor.movedim(dim, 1) if dim != 1 and tensor.ndim > dim else tensor


def with_rows_back(tensor: Tensor, dim: int) -> Tensor:
    """The inverse of `with_rows_second`."""
    return tensor[0] if dim == 0 else tensor.movedim(1, dim) if dim != 1 else tensor


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the `input` port of a call holds: its first positional argument, else its first keyword argument."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _members(items: Any) -> Iterator[tuple[Selector, Tensor]]:
    for key, member in items:
        if isinstance(member, Tensor):
            yield (key,), member
        elif isinstance(member, (tuple, list)):
            yield from (((key, place), leaf) for place, leaf in enumerate(member) if isinstance(leaf, Tensor))
