"""What the statements of random programs do, to recorded and to plain values alike.

The same functions compute on recorded values in `language_written` and on plain tensors in `language_by_hand`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from language_ops import OPERATIONS, ROW, fit
from language_programs import Apply
from language_sites import Spot
from torch import Tensor


def compute(statement: Apply, values: Sequence[Any], lengths: Sequence[int]) -> Any:
    """The value of an operation; lengths are those of the prompts of its invoke."""
    a, b = statement.numbers
    if statement.op in TAKEN:
        return TAKEN[statement.op](*values, a, b, lengths)
    operation = OPERATIONS[statement.op]
    if operation.num_operands == 2:
        first, second = values
        second = second if tuple(second.shape) == tuple(first.shape) else fit(second, tuple(first.shape))
        found = operation.run(first, second, a, b)
    else:
        found = operation.run(values[0], a, b)
    return found * 1.0 if found is values[0] else found  # a value is saved once


def _at(view: Any, a: int, b: int, lengths: Sequence[int]) -> Any:
    position = a % min(lengths)
    if type(view) is not Tensor:
        return view.at(position)
    columns = [max(lengths) - length + position for length in lengths]
    return view[torch.arange(len(lengths)), columns]


def given_to(value: Any, shape: tuple[int, ...] | None) -> Any:
    """What a module is called on; never nearly the same everywhere, where norms would show rounding."""
    given = value if shape is None else fit(value, shape)
    return (given.tanh() + ROW[: given.shape[-1]]).contiguous()


TAKEN: dict[str, Callable[..., Any]] = {
    "column": lambda v, a, b, lengths: v[:, -1 - a % min(lengths)],
    "first columns": lambda v, a, b, lengths: v[:, 0],
    "last columns": lambda v, a, b, lengths: v[:, -min(lengths) :],
    "at": _at,
    "row of heads": lambda v, a, b, lengths: v[:, :, -1],
    "seen": lambda v, a, b, lengths: v.clamp_min(-2.0),
    "number": lambda v, a, b, lengths: v * 0.125,
    "masked sum": lambda v, mask, a, b, lengths: (v * mask[(...,) + (None,) * (v.dim() - 2)]).sum(1) / max(lengths),
}

FACTORS = (0.5, -1.0, 1.5, 0.0, -0.25)


def change(how: str, view: Any, value: Any, numbers: tuple[int, int], shortest: int) -> Any:
    """In-place code on a view `[sequences, tokens, ...]`; nothing is returned."""
    a, b = numbers
    width, factor, column = view.shape[-1], FACTORS[a % len(FACTORS)], -1 - b % shortest
    low = a % width
    part = tuple(view.shape[:1]) + tuple(view.shape[2:])
    if how == "scale":
        view.mul_(factor)
    elif how == "scale column":
        view[:, column] *= factor
    elif how == "set column":
        view[:, column] = fit(value, part)
    elif how == "add to column":
        view[:, column] += fit(value, part)
    elif how == "copy into column":
        view[:, column].copy_(fit(value, part))
    elif how == "fill column":
        view[:, column].fill_(0.25 * (a % 5))
    elif how == "features":
        view[..., low:] = 0.0
    elif how == "some features":
        view[:, column:, ..., low : low + 9] -= 0.75
    elif how == "list":
        view[:, [0, -1]] = view[:, [0, -1]] * 0.5 + fit(value, (width,))
    elif how == "add":
        view.add_(fit(value, (width,)), alpha=0.5)
    elif how == "clamp":
        view.clamp_(-0.4, 0.4)
    elif how == "whole":
        view[:] = view * 0.5 + fit(value, (width,))
    elif how == "ellipsis":
        view[...] = torch.where(view > 0.3, view * 0.1 + 0.27, view)
    elif how == "masked":
        view[view > 0.5] = 0.5
    elif how == "transposed":
        view.transpose(-1, -2)[..., low, :] *= -1.0
    elif how == "unflattened":
        view.unflatten(-1, (width // 2, 2))[..., 1] = 0.3
    elif how == "head":
        view[:, column, a % view.shape[2]] *= 0.25
    elif how == "hide":
        view[:, -1, a % view.shape[2], 1:-1] = float("-inf")
    else:
        raise AssertionError(how)


def made(how: str, view: Any, value: Any, numbers: tuple[int, int], shortest: int) -> Any:
    """What is assigned instead of a view."""
    if how == "changed":
        own = view.clone()
        change("add to column", own, value, numbers, shortest)
        return own
    if how == "blend":
        return view * 0.5 + value.tanh() * 0.5
    if how == "half":
        return view * 0.5
    return view * FACTORS[numbers[0] % len(FACTORS)] + fit(value, (view.shape[-1],))


ROWWISE = ("scale", "scale column", "fill column", "features", "some features", "clamp", "ellipsis", "masked")
IN_PLACE = (
    *ROWWISE, "set column", "add to column", "copy into column", "list", "add", "whole", "transposed", "unflattened",
)  # fmt: skip
ASSIGNED = ("changed", "blend", "tilted", "tilted")
WANTS_VALUE = {"set column", "add to column", "copy into column", "list", "add", "whole", *ASSIGNED}


def tokens_first(view: Any, spot: Spot) -> Any:
    """A view of a site's value, or of what stands for it, with its tokens in the second dimension."""
    return view if spot.token_dim == 1 else view.transpose(1, spot.token_dim)


def instead(given: Any, value: Any) -> Any:
    """What a skipped module gives."""
    return given * 0.75 if value is None else given * 0.75 + fit(value, (given.shape[-1],))
